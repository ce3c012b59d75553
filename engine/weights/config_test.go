package weights

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestReadConfig(t *testing.T) {
	dir := t.TempDir()
	text := `{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 2}`
	write(t, filepath.Join(dir, "config.json"), []byte(text))
	c, err := ReadConfig(dir)
	require.NoError(t, err)
	require.Equal(t, []string{"GPT2LMHeadModel"}, c.Architectures)
	require.Equal(t, "gpt2", c.ModelType)
	require.JSONEq(t, text, string(c.JSON))
}

func TestBadConfigsSayWhatIsWrong(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		says string
	}{
		"empty":            {" \n", "is empty"},
		"cut short":        {"{\n  \"a\": 1,\n  \"b\"", "line 3, column 5"},
		"comma too many":   {"{\n  \"a\": 1,\n}", "line 3, column 1"},
		"after the end":    {"{} x", "line 1, column 4"},
		"list":             {`["GPT2LMHeadModel"]`, "a JSON array instead of an object"},
		"name, not a list": {"{\n\"architectures\": \"GPT2LMHeadModel\"}", "line 2: architectures cannot be a JSON string"},
		"no architecture":  {`{"n_layer": 2}`, "names no architecture"},
		"null":             {`null`, "names no architecture"},
		"only a type":      {`{"model_type": "gpt2", "architectures": null}`, `only the model type "gpt2"`},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, filepath.Join(dir, "config.json"), []byte(c.text))
			_, err := ReadConfig(dir)
			require.ErrorContains(t, err, c.says)
			require.ErrorContains(t, err, filepath.Join(dir, "config.json"))
		})
	}
}

func TestADirectoryWithoutConfig(t *testing.T) {
	dir := t.TempDir()
	_, err := ReadConfig(filepath.Join(dir, "gone"))
	refused(t, err, "there is no directory "+filepath.Join(dir, "gone"))
	for _, name := range strings.Fields("a b c d e f g h i j") {
		write(t, filepath.Join(dir, name), nil)
	}
	_, err = ReadConfig(dir)
	refused(t, err, "holds no config.json", "model.safetensors", "a, b, c, d, e, f, g, h, and 2 more")
	_, err = ReadConfig(filepath.Join(dir, "a"))
	refused(t, err, "is a file")
	large := filepath.Join(dir, "config.json")
	write(t, large, nil)
	require.NoError(t, os.Truncate(large, maxJSON+1))
	_, err = ReadConfig(dir)
	refused(t, err, large, "are allowed")
}

func TestReadGenerationConfig(t *testing.T) {
	id := func(i int64) *int64 { return &i }
	for name, c := range map[string]struct {
		config, generation string // "" where there is no such file
		want               GenerationConfig
	}{
		"neither": {"", "", GenerationConfig{}},
		"one id":  {"", `{"eos_token_id": 5, "pad_token_id": 0}`, GenerationConfig{EOS: []int64{5}, Pad: id(0)}},
		"several": {"", `{"eos_token_id": [1, 2], "bos_token_id": 3}`, GenerationConfig{EOS: []int64{1, 2}, BOS: id(3)}},
		"null":    {"", `{"eos_token_id": null}`, GenerationConfig{}},
		"config":  {`{"eos_token_id": 9, "bos_token_id": 8}`, "", GenerationConfig{EOS: []int64{9}, BOS: id(8)}},
		"both":    {`{"eos_token_id": 9, "bos_token_id": 8}`, `{"eos_token_id": [7]}`, GenerationConfig{EOS: []int64{7}, BOS: id(8)}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if c.config != "" {
				write(t, filepath.Join(dir, "config.json"), []byte(c.config))
			}
			if c.generation != "" {
				write(t, filepath.Join(dir, "generation_config.json"), []byte(c.generation))
				c.want.JSON = []byte(c.generation)
			}
			got, err := ReadGenerationConfig(dir)
			require.NoError(t, err)
			require.Equal(t, &c.want, got)
		})
	}
	dir := t.TempDir()
	write(t, filepath.Join(dir, "generation_config.json"), []byte(`{"eos_token_id": "end"}`))
	_, err := ReadGenerationConfig(dir)
	require.ErrorContains(t, err, "generation_config.json")
}
