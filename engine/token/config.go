package token

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// SpecialToken is a token with a part to play.
type SpecialToken struct {
	Content string `json:"token"`
	ID      int64  `json:"id"`
}

// Special are the special tokens that the configuration names; nil where it names none.
type Special struct {
	BOS        *SpecialToken  `json:"bos_token,omitempty"`
	EOS        *SpecialToken  `json:"eos_token,omitempty"`
	UNK        *SpecialToken  `json:"unk_token,omitempty"`
	SEP        *SpecialToken  `json:"sep_token,omitempty"`
	PAD        *SpecialToken  `json:"pad_token,omitempty"`
	CLS        *SpecialToken  `json:"cls_token,omitempty"`
	MASK       *SpecialToken  `json:"mask_token,omitempty"`
	Additional []SpecialToken `json:"additional_special_tokens,omitempty"`
}

// named is one special token of the configuration, in its own two spellings: a string, or an object
// with the flags of an AddedToken.
type named struct {
	AddedToken
	Type string `json:"__type"` // "AddedToken", or something that is no token
}

// UnmarshalJSON takes a string or an object.
func (n *named) UnmarshalJSON(data []byte) error {
	if len(data) > 0 && data[0] == '"' {
		n.Special = true
		return json.Unmarshal(data, &n.Content)
	}
	type plain named // without this method
	return json.Unmarshal(data, (*plain)(n))
}

// named tokens are added as special ones, wherever they were spelled.
func (n named) token() AddedToken {
	a := n.AddedToken
	a.Special = true
	return a
}

// roles lists the special tokens by the key that names them, in the order in which missing ones are
// added to the vocabulary.
var roles = []string{"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}

// config is what the files beside tokenizer.json say.
type config struct {
	Class          string
	Roles          map[string]named // by the names in roles
	Additional     []named
	Decoder        []AddedToken // added_tokens_decoder, by rising id
	PaddingSide    string
	TruncationSide string
	ModelMaxLength int
	Templates      map[string]string
	AddBOS, AddEOS bool
	Built          bool // there is no tokenizer.json; it was made of other files
	AddPrefixSpace bool
	CleanUp        bool
	InputNames     []string
}

// rawConfig is tokenizer_config.json; keys that are not used are passed over.
type rawConfig struct {
	Class          string                `json:"tokenizer_class"`
	Decoder        map[string]AddedToken `json:"added_tokens_decoder"`
	PaddingSide    string                `json:"padding_side"`
	TruncationSide string                `json:"truncation_side"`
	ModelMaxLength *float64              `json:"model_max_length"` // often 1e30, for "no limit"
	Template       json.RawMessage       `json:"chat_template"`
	AddBOS         bool                  `json:"add_bos_token"`
	AddEOS         bool                  `json:"add_eos_token"`
	AddPrefixSpace bool                  `json:"add_prefix_space"`
	CleanUp        bool                  `json:"clean_up_tokenization_spaces"`
	InputNames     []string              `json:"model_input_names"`
}

func readConfig(dir string) (config, error) {
	c := config{Roles: map[string]named{}, Templates: map[string]string{}, PaddingSide: "right", TruncationSide: "right"}
	path := filepath.Join(dir, fileConfig)
	var raw rawConfig
	var keys map[string]json.RawMessage
	if _, err := readJSON(path, &keys); err != nil {
		return c, err
	}
	if _, err := readJSON(path, &raw); err != nil {
		return c, err
	}
	c.Class, c.AddBOS, c.AddEOS, c.InputNames = raw.Class, raw.AddBOS, raw.AddEOS, raw.InputNames
	c.AddPrefixSpace, c.CleanUp = raw.AddPrefixSpace, raw.CleanUp
	if raw.ModelMaxLength != nil && *raw.ModelMaxLength > 0 && *raw.ModelMaxLength < 1<<53 {
		c.ModelMaxLength = int(*raw.ModelMaxLength)
	}
	for side, value := range map[*string]string{&c.PaddingSide: raw.PaddingSide, &c.TruncationSide: raw.TruncationSide} {
		switch value {
		case "":
		case "left", "right":
			*side = value
		default:
			return c, broken(path, fmt.Sprintf("a side is %q, neither \"left\" nor \"right\"", value))
		}
	}
	if err := c.readDecoder(path, raw.Decoder); err != nil {
		return c, err
	}
	if err := c.readSpecial(path, keys); err != nil {
		return c, err
	}
	// transformers reads special_tokens_map.json only for directories saved before
	// added_tokens_decoder existed; there, it wins.
	if raw.Decoder == nil {
		path, keys := filepath.Join(dir, fileSpecial), map[string]json.RawMessage{}
		if _, err := readJSON(path, &keys); err != nil {
			return c, err
		}
		if err := c.readSpecial(path, keys); err != nil {
			return c, err
		}
	}
	return c, c.readTemplates(dir, raw.Template)
}

// readDecoder takes over added_tokens_decoder, whose keys are ids.
func (c *config) readDecoder(path string, decoder map[string]AddedToken) error {
	for key, a := range decoder {
		id, err := strconv.ParseInt(key, 10, 64)
		if err != nil {
			return broken(path, fmt.Sprintf("added_tokens_decoder has the key %q, which is no id", key))
		}
		a.ID = id
		c.Decoder = append(c.Decoder, a)
	}
	sort.Slice(c.Decoder, func(i, j int) bool { return c.Decoder[i].ID < c.Decoder[j].ID })
	return nil
}

// readSpecial takes over the special tokens among the keys of a file.
func (c *config) readSpecial(path string, keys map[string]json.RawMessage) error {
	for _, role := range roles {
		if isNull(keys[role]) {
			continue
		}
		var n named
		if err := json.Unmarshal(keys[role], &n); err != nil {
			return broken(path, role+": "+reasonJSON(err))
		}
		c.Roles[role] = n
	}
	for _, key := range []string{"additional_special_tokens", "extra_special_tokens"} {
		if isNull(keys[key]) {
			continue
		}
		var list []named
		if json.Unmarshal(keys[key], &list) != nil {
			// Newer files may give an object, role -> token, here.
			var byRole map[string]named
			if err := json.Unmarshal(keys[key], &byRole); err != nil {
				return broken(path, key+": "+reasonJSON(err))
			}
			for _, role := range sortedKeys(byRole) {
				list = append(list, byRole[role])
			}
		}
		for _, n := range list {
			if !c.hasAdditional(n.Content) {
				c.Additional = append(c.Additional, n)
			}
		}
	}
	return nil
}

func (c *config) hasAdditional(content string) bool {
	for _, n := range c.Additional {
		if n.Content == content {
			return true
		}
	}
	return false
}

// readTemplates takes chat templates from tokenizer_config.json (a string, or a list of
// {"name", "template"}), then from files, which win.
func (c *config) readTemplates(dir string, raw json.RawMessage) error {
	if !isNull(raw) {
		var text string
		if json.Unmarshal(raw, &text) == nil {
			c.Templates["default"] = text
		} else {
			var list []struct{ Name, Template string }
			if err := json.Unmarshal(raw, &list); err != nil {
				return broken(filepath.Join(dir, fileConfig), "chat_template: "+reasonJSON(err))
			}
			for _, entry := range list {
				c.Templates[entry.Name] = entry.Template
			}
		}
	}
	files := map[string]string{"default": filepath.Join(dir, fileTemplate)}
	entries, _ := os.ReadDir(filepath.Join(dir, dirTemplates)) // usually there is none
	for _, entry := range entries {
		if name, ok := strings.CutSuffix(entry.Name(), ".jinja"); ok {
			files[name] = filepath.Join(dir, dirTemplates, entry.Name())
		}
	}
	for name, path := range files {
		data, err := readFile(path)
		if err != nil {
			return err
		}
		if data != nil {
			c.Templates[name] = string(data)
		}
	}
	return nil
}

// readAdded takes over added_tokens.json (token -> id), which only directories without a
// tokenizer.json need.
func (c *config) readAdded(dir string) error {
	var ids map[string]int64
	if _, err := readJSON(filepath.Join(dir, fileAdded), &ids); err != nil {
		return err
	}
	tokens := sortedKeys(ids)
	sort.SliceStable(tokens, func(i, j int) bool { return ids[tokens[i]] < ids[tokens[j]] })
	for _, content := range tokens {
		c.Decoder = append(c.Decoder, AddedToken{ID: ids[content], Content: content})
	}
	return nil
}

// fill names a token bos, eos and unk, where the configuration names none.
func (c *config) fill(content string) {
	for _, role := range []string{"bos_token", "eos_token", "unk_token"} {
		if _, ok := c.Roles[role]; !ok {
			c.Roles[role] = named{AddedToken: AddedToken{Content: content, Special: true}}
		}
	}
}

// tokens lists what the vocabulary must have, in the order in which missing ones get ids.
func (c *config) tokens() []AddedToken {
	list := append([]AddedToken(nil), c.Decoder...)
	for _, role := range roles {
		if n, ok := c.Roles[role]; ok {
			list = append(list, n.token())
		}
	}
	for _, n := range c.Additional {
		list = append(list, n.token())
	}
	return list
}

// special finds the ids of the special tokens.
func (t *Tokenizer) special() (s Special, err error) {
	find := func(content string) (*SpecialToken, error) {
		id, err := rustLookup(t.raw, content)
		if err != nil {
			return nil, err
		}
		if id < 0 {
			return nil, fault.New(fault.Tokenizer, "the special token %q is not in the vocabulary", content)
		}
		return &SpecialToken{Content: content, ID: id}, nil
	}
	places := map[string]**SpecialToken{
		"bos_token": &s.BOS, "eos_token": &s.EOS, "unk_token": &s.UNK, "sep_token": &s.SEP,
		"pad_token": &s.PAD, "cls_token": &s.CLS, "mask_token": &s.MASK,
	}
	for role, place := range places {
		if n, ok := t.conf.Roles[role]; ok && n.Content != "" {
			if *place, err = find(n.Content); err != nil {
				return s, err
			}
		}
	}
	for _, n := range t.conf.Additional {
		token, err := find(n.Content)
		if err != nil {
			return s, err
		}
		s.Additional = append(s.Additional, *token)
	}
	return s, nil
}

func isNull(raw json.RawMessage) bool { return len(raw) == 0 || string(raw) == "null" }

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	return keys
}
