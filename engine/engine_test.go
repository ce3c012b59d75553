package engine

import (
	"os"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/stretchr/testify/require"
)

func TestEncodeAndDecode(t *testing.T) {
	m, err := Open(enginetest.Directory(t, enginetest.Llama, 1), Options{})
	require.NoError(t, err)
	defer func() { require.NoError(t, m.Close()) }()
	ids, err := m.Encode("w03 w21")
	require.NoError(t, err)
	require.Equal(t, []int64{3, 21}, ids)
	text, err := m.Decode(ids)
	require.NoError(t, err)
	require.Equal(t, "w03 w21", text)
	_, err = m.Decode([]int64{99})
	require.ErrorContains(t, err, "99")
}

func TestClosed(t *testing.T) {
	live := aten.Live()
	m, err := Open(enginetest.Directory(t, enginetest.GPT2, 1), Options{Load: true})
	require.NoError(t, err)
	_, err = m.Encode("w01")
	require.NoError(t, err)
	require.NoError(t, m.Close())
	require.NoError(t, m.Close())
	require.Equal(t, live, aten.Live())
	_, err = m.Encode("w01")
	require.Equal(t, fault.Handle, fault.As(err).Code, "a closed model opens nothing anew")
	require.Error(t, m.Load())
}

func TestNoSuchModel(t *testing.T) {
	t.Setenv("HF_HUB_CACHE", t.TempDir())
	for name, says := range map[string]string{
		"some/model":      "no model of that name in the local Hugging Face cache",
		"/no/such/folder": "there is no directory /no/such/folder",
		"":                "",
	} {
		_, err := Open(name, Options{})
		require.ErrorContains(t, err, says)
		require.Equal(t, fault.ModelLoad, fault.As(err).Code)
	}
}

func TestBrokenTokenizer(t *testing.T) {
	dir := enginetest.Directory(t, enginetest.GPT2, 1)
	require.NoError(t, os.Truncate(dir+"/tokenizer.json", 40))
	m, err := Open(dir, Options{})
	require.NoError(t, err, "ids can be traced without a tokenizer")
	defer func() { require.NoError(t, m.Close()) }()
	_, err = m.Encode("w01")
	require.Equal(t, fault.Tokenizer, fault.As(err).Code)
	require.ErrorContains(t, err, dir)
}
