package weights

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// Config is a model's config.json. What an architecture needs of it, the architecture reads.
type Config struct {
	Architectures []string        `json:"architectures"`
	ModelType     string          `json:"model_type"`
	JSON          json.RawMessage `json:"-"` // the whole file
}

// ReadConfig reads the config.json of a model directory. It names at least one architecture.
func ReadConfig(dir string) (*Config, error) {
	if stat, err := os.Stat(dir); err != nil || !stat.IsDir() {
		return nil, noDirectory(dir, err)
	}
	file := filepath.Join(dir, "config.json")
	text, err := readSmall(file)
	if os.IsNotExist(err) {
		return nil, fault.New(fault.ModelLoad, "%s holds no config.json", dir).
			WithHint("%s This one holds %s.", layout, listing(dir))
	}
	if err != nil {
		return nil, fault.New(fault.ModelLoad, "%s cannot be read", file).WithCause(err)
	}
	c := &Config{JSON: text}
	if err := decode(file, text, c); err != nil {
		return nil, err
	}
	if len(c.Architectures) == 0 {
		if c.ModelType != "" {
			return nil, fault.New(fault.ModelLoad, "%s names no architecture, only the model type %q", file, c.ModelType).
				WithHint(`It needs a line such as "architectures": ["GPT2LMHeadModel"].`)
		}
		return nil, fault.New(fault.ModelLoad, "%s names no architecture", file).
			WithHint(`It needs a line such as "architectures": ["GPT2LMHeadModel"].`)
	}
	return c, nil
}

// GenerationConfig is what a model's generation_config.json says of the ends of a text.
type GenerationConfig struct {
	EOS  []int64         // any of these ids ends a text; nil where the file names none
	BOS  *int64          // begins a text
	Pad  *int64          // fills rows up
	JSON json.RawMessage // the whole file; nil where there is none
}

// ReadGenerationConfig reads the generation_config.json of a model directory, falling back on
// config.json, where older models keep the same fields. A directory without either gives a zero
// config.
func ReadGenerationConfig(dir string) (*GenerationConfig, error) {
	g := &GenerationConfig{}
	for _, name := range []string{"generation_config.json", "config.json"} {
		file := filepath.Join(dir, name)
		text, err := readSmall(file)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return nil, fault.New(fault.ModelLoad, "%s cannot be read", file).WithCause(err)
		}
		var parsed struct {
			EOS ids    `json:"eos_token_id"`
			BOS *int64 `json:"bos_token_id"`
			Pad *int64 `json:"pad_token_id"`
		}
		if err := decode(file, text, &parsed); err != nil {
			return nil, err
		}
		if strings.HasPrefix(name, "generation") {
			g.JSON = text
		}
		if g.EOS == nil {
			g.EOS = parsed.EOS
		}
		if g.BOS == nil {
			g.BOS = parsed.BOS
		}
		if g.Pad == nil {
			g.Pad = parsed.Pad
		}
	}
	return g, nil
}

// ids is one id or a list of them.
type ids []int64

// UnmarshalJSON reads either form.
func (i *ids) UnmarshalJSON(text []byte) error {
	if strings.HasPrefix(string(text), "[") || string(text) == "null" {
		return json.Unmarshal(text, (*[]int64)(i))
	}
	*i = make(ids, 1)
	return json.Unmarshal(text, &(*i)[0])
}
