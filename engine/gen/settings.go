package gen

import (
	"encoding/json"
	"strconv"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/weights"
)

// DefaultNewTokens is how many tokens are added without a word about it, as in transformers.
const DefaultNewTokens = 20

// Defaults are the settings that a model directory asks for: those of its generation_config.json, over
// transformers' defaults.
func Defaults(dir string) (Settings, error) {
	config, err := weights.ReadGenerationConfig(dir)
	if err != nil {
		return Settings{}, err
	}
	stored := struct {
		Settings
		EOS           any      `json:"eos_token_id"` // read already: the file may have one, or several
		Pad           any      `json:"pad_token_id"`
		EarlyStopping any      `json:"early_stopping"` // a bool, or "never"
		TopK          *int64   `json:"top_k"`
		LengthPenalty *float64 `json:"length_penalty"`
	}{Settings: Settings{MaxNewTokens: DefaultNewTokens}}
	if config.JSON != nil {
		if err := json.Unmarshal(config.JSON, &stored); err != nil {
			return Settings{}, fault.New(fault.ModelLoad, "%s/generation_config.json is not what it should be: %v", dir, err)
		}
	}
	s := stored.Settings
	s.EOS = config.EOS
	switch {
	case config.Pad != nil:
		s.Pad = *config.Pad
	case len(s.EOS) > 0:
		s.Pad = s.EOS[0]
	}
	switch {
	case stored.TopK != nil:
		s.TopK = *stored.TopK
	case s.Sample:
		s.TopK = 50
	}
	s.LengthPenalty = 1
	if stored.LengthPenalty != nil {
		s.LengthPenalty = *stored.LengthPenalty
	}
	switch early := stored.EarlyStopping.(type) {
	case string:
		s.EarlyStopping = early
	case bool:
		s.EarlyStopping = strconv.FormatBool(early)
	default:
		s.EarlyStopping = "false"
	}
	return s, nil
}
