package weights

import (
	"encoding/json"
	"os"
	"path/filepath"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// Config is a model's config.json.
type Config struct {
	Architectures []string        `json:"architectures"`
	ModelType     string          `json:"model_type"`
	JSON          json.RawMessage `json:"-"` // the whole file
}

// ReadConfig reads the config.json of a model directory.
func ReadConfig(dir string) (*Config, error) {
	if stat, err := os.Stat(dir); err != nil || !stat.IsDir() {
		return nil, fault.New(fault.ModelLoad, "there is no directory %s", dir).WithCause(err)
	}
	file := filepath.Join(dir, "config.json")
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fault.New(fault.ModelLoad, "%s holds no config.json", dir).
			WithHint("A model directory holds config.json, model.safetensors and tokenizer.json. This one holds: %s.", listing(dir))
	}
	c := &Config{JSON: text}
	if err := json.Unmarshal(text, c); err != nil {
		return nil, fault.New(fault.ModelLoad, "%s is not a model's config", file).WithCause(err).
			WithHint("It may be corrupt or cut short: copy or download it again.")
	}
	if len(c.Architectures) == 0 {
		return nil, fault.New(fault.ModelLoad, "%s names no architecture", file).
			WithHint(`It needs a line such as "architectures": ["GPT2LMHeadModel"].`)
	}
	return c, nil
}
