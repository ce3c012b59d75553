package engine

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/stretchr/testify/require"
)

func TestTheBuiltInModelLiesBesideTheLibraries(t *testing.T) {
	libraries, err := aten.LibraryDir()
	require.NoError(t, err)
	require.FileExists(t, filepath.Join(libraries, "libnng_aten.so"))

	dir, err := resolve(BuiltIn)
	require.NoError(t, err)
	require.Equal(t, filepath.Join(filepath.Dir(libraries), "models", "landmarks"), dir)
	model, err := Open(BuiltIn, Options{Load: true})
	require.NoError(t, err)
	defer model.Close()
	ids, err := model.Encode("The Eiffel Tower is in")
	require.NoError(t, err)
	require.Len(t, ids, 7)
	text, err := model.Decode(ids)
	require.NoError(t, err)
	require.Equal(t, "The Eiffel Tower is in", text)
}

func TestModelsThatDoNotComeWithTheLibrary(t *testing.T) {
	root := t.TempDir()
	_, err := builtIn(filepath.Join(root, "nowhere"), "landmarks")
	require.ErrorContains(t, err, `no model "nnsight-go/landmarks" comes with`)
	require.ErrorContains(t, err, "nowhere")
	require.ErrorContains(t, err, "or give the directory of a model")

	require.NoError(t, os.Mkdir(filepath.Join(root, "landmarks"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(root, "card.md"), nil, 0o644))
	dir, err := builtIn(root, "landmarks")
	require.NoError(t, err)
	require.Equal(t, filepath.Join(root, "landmarks"), dir)
	for _, name := range []string{"landmark", "card.md", "", ".", "..", "../" + filepath.Base(root), "landmarks/.."} {
		_, err := builtIn(root, name)
		require.Equal(t, fault.ModelLoad, fault.As(err).Code, name)
		require.ErrorContains(t, err, "There is nnsight-go/landmarks.", name)
	}
	_, err = resolve("nnsight-go/landmark")
	require.ErrorContains(t, err, `no model "nnsight-go/landmark" comes with`)
}

func TestADirectoryOfThatNameGoesFirst(t *testing.T) {
	t.Chdir(t.TempDir())
	require.NoError(t, os.MkdirAll(BuiltIn, 0o755))
	dir, err := resolve(BuiltIn)
	require.NoError(t, err)
	require.Equal(t, filepath.FromSlash(BuiltIn), dir)
}
