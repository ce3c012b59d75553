package token

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	daulet "github.com/daulet/tokenizers"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// The files of a model directory that make its tokenizer.
const (
	fileTokenizer = "tokenizer.json"
	fileConfig    = "tokenizer_config.json"
	fileSpecial   = "special_tokens_map.json"
	fileTemplate  = "chat_template.jinja"
	dirTemplates  = "additional_chat_templates"
	fileVocab     = "vocab.json"
	fileMerges    = "merges.txt"
	fileAdded     = "added_tokens.json"
	fileSentence  = "tokenizer.model"
)

// maxFile bounds what is read into memory, in bytes. The largest tokenizer.json in use is below 40 MB.
const maxFile = 512 << 20

// Open opens the tokenizer of a model directory.
//
// It reads tokenizer.json or, where there is none, GPT-2's vocab.json and merges.txt; and, where
// they exist, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and
// additional_chat_templates/. As in transformers, special tokens that only the configuration names
// are added to the vocabulary, and its add_bos_token and add_eos_token count only where there is no
// tokenizer.json, which says itself what is put around a text. Truncation and padding stored in
// tokenizer.json are ignored.
//
// A file that is missing, truncated or wrong is an error that names it.
func Open(dir string) (*Tokenizer, error) {
	stat, err := os.Stat(dir)
	if err != nil || !stat.IsDir() {
		return nil, fault.New(fault.Tokenizer, "%s is not a directory", dir).
			WithHint("Give the directory that holds the model's %s.", fileTokenizer).WithCause(err)
	}
	conf, err := readConfig(dir)
	if err != nil {
		return nil, err
	}
	data, name, err := readTokenizer(dir, &conf)
	if err != nil {
		return nil, err
	}
	inner, err := daulet.FromBytes(data)
	if err != nil {
		reason := strings.TrimPrefix(err.Error(), "Failed to create tokenizer from bytes: ")
		return nil, broken(filepath.Join(dir, name), reason)
	}
	t := &Tokenizer{inner: inner, raw: handle(inner), dir: dir, conf: conf}
	if err := t.finish(); err != nil {
		t.Close()
		e := fault.As(err)
		return nil, fault.New(fault.Tokenizer, "the tokenizer in %s cannot be used: %s", dir, e.Message).
			WithHint("Check %s and %s.", fileConfig, fileSpecial).WithCause(err)
	}
	return t, nil
}

// finish brings what the configuration says into the freshly opened tokenizer.
func (t *Tokenizer) finish() (err error) {
	if t.info, err = rustDescribe(t.raw); err != nil {
		return err
	}
	have := map[string]bool{}
	for _, a := range t.info.Added {
		have[a.Content] = true
	}
	var missing []AddedToken
	for _, a := range t.conf.tokens() {
		if !have[a.Content] && a.Content != "" {
			have[a.Content] = true
			missing = append(missing, a)
		}
	}
	if len(missing) > 0 {
		if err := rustAddTokens(t.raw, missing); err != nil {
			return err
		}
	}
	if t.spec, err = t.special(); err != nil {
		return err
	}
	if t.conf.Built {
		if err := rustPostProcessor(t.raw, t.template()); err != nil {
			return err
		}
	}
	if t.info, err = rustDescribe(t.raw); err != nil {
		return err
	}
	return t.probe()
}

// probe finds out whether texts get a bos and an eos token, whatever post-processor does it.
func (t *Tokenizer) probe() error {
	e, err := t.Encode("a", true)
	if n := len(e.IDs); err == nil && n > 0 {
		t.addBOS = t.spec.BOS != nil && e.SpecialMask[0] == 1 && e.IDs[0] == t.spec.BOS.ID
		t.addEOS = t.spec.EOS != nil && e.SpecialMask[n-1] == 1 && e.IDs[n-1] == t.spec.EOS.ID
	}
	return err
}

// template is the post-processor that puts bos before and eos after a text, as the flags say.
func (t *Tokenizer) template() any {
	type m = map[string]any
	special := m{}
	side := func(wanted bool, token *SpecialToken, kind int) []any {
		if !wanted || token == nil {
			return nil
		}
		special[token.Content] = m{"id": token.Content, "ids": []int64{token.ID}, "tokens": []string{token.Content}}
		return []any{m{"SpecialToken": m{"id": token.Content, "type_id": kind}}}
	}
	part := func(name string, kind int) []any {
		pieces := side(t.conf.AddBOS, t.spec.BOS, kind)
		pieces = append(pieces, m{"Sequence": m{"id": name, "type_id": kind}})
		return append(pieces, side(t.conf.AddEOS, t.spec.EOS, kind)...)
	}
	return m{
		"type": "TemplateProcessing", "single": part("A", 0), "pair": append(part("A", 0), part("B", 1)...),
		"special_tokens": special,
	}
}

// readTokenizer gives the text of tokenizer.json, or one made of vocab.json and merges.txt, and the
// name of the file to blame.
func readTokenizer(dir string, conf *config) ([]byte, string, error) {
	data, err := readFile(filepath.Join(dir, fileTokenizer))
	if err != nil || data != nil {
		if err == nil && len(bytes.TrimSpace(data)) == 0 {
			err = broken(filepath.Join(dir, fileTokenizer), "it is empty")
		}
		return data, fileTokenizer, err
	}
	if exists(dir, fileVocab) && exists(dir, fileMerges) {
		// Other models keep the same two files for other rules (RoBERTa's special tokens, CLIP's
		// word ends), so build only what is known to be GPT-2's.
		if class := strings.TrimSuffix(conf.Class, "Fast"); class != "" && class != "GPT2Tokenizer" {
			return nil, "", fault.New(fault.Tokenizer, "%s has no %s, and its %s cannot be built from %s and %s",
				dir, fileTokenizer, conf.Class, fileVocab, fileMerges).WithHint(convert, fileTokenizer)
		}
		conf.Built = true
		data, err := buildGPT2(dir, conf)
		return data, fileVocab, err
	}
	missing := fault.New(fault.Tokenizer, "%s has no %s", dir, fileTokenizer)
	if exists(dir, fileSentence) {
		return nil, "", missing.WithHint("Its %s is a SentencePiece model. "+convert, fileSentence, fileTokenizer)
	}
	return nil, "", missing.WithHint("Download it with the model's other files, or trace with token ids instead of text.")
}

const convert = "Make %s once in Python: transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)."

// buildGPT2 makes a tokenizer.json of GPT-2's two files: byte-level BPE.
func buildGPT2(dir string, conf *config) ([]byte, error) {
	vocab, err := readFile(filepath.Join(dir, fileVocab))
	if err != nil {
		return nil, err
	}
	var entries map[string]uint32
	if err := json.Unmarshal(vocab, &entries); err != nil {
		return nil, broken(filepath.Join(dir, fileVocab), reasonJSON(err))
	}
	text, err := readFile(filepath.Join(dir, fileMerges))
	if err != nil {
		return nil, err
	}
	merges := [][2]string{}
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSuffix(line, "\r")
		if line == "" || i == 0 && strings.HasPrefix(line, "#version") {
			continue
		}
		left, right, ok := strings.Cut(line, " ")
		if !ok || left == "" || right == "" || strings.Contains(right, " ") {
			return nil, broken(filepath.Join(dir, fileMerges), fmt.Sprintf("line %d is not two tokens", i+1))
		}
		merges = append(merges, [2]string{left, right})
	}
	if _, ok := entries[endOfText]; ok {
		conf.fill(endOfText)
	}
	if err := conf.readAdded(dir); err != nil {
		return nil, err
	}
	type m = map[string]any
	level := m{"type": "ByteLevel", "add_prefix_space": conf.AddPrefixSpace, "trim_offsets": true, "use_regex": true}
	return json.Marshal(m{
		"version": "1.0", "added_tokens": []any{}, "normalizer": nil, "pre_tokenizer": level,
		"post_processor": nil, "decoder": level,
		"model": m{
			"type": "BPE", "vocab": json.RawMessage(vocab), "merges": merges, "unk_token": nil,
			"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false,
		},
	})
}

// endOfText is the one special token of GPT-2, which its own two files do not mark.
const endOfText = "<|endoftext|>"

func exists(dir, name string) bool {
	_, err := os.Stat(filepath.Join(dir, name))
	return err == nil
}

// readFile gives a file's bytes, nil where there is no such file.
func readFile(path string) ([]byte, error) {
	stat, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil && stat.Size() > maxFile {
		return nil, broken(path, fmt.Sprintf("it has %d bytes, more than any tokenizer needs", stat.Size()))
	}
	var data []byte
	if err == nil {
		data, err = os.ReadFile(path)
	}
	if err != nil {
		return nil, fault.New(fault.Tokenizer, "%s cannot be read", path).
			WithHint("Check that the file is there and that you may read it.").WithCause(err)
	}
	if data == nil {
		data = []byte{}
	}
	return data, nil
}

// readJSON reads a JSON file into v and reports whether there is one.
func readJSON(path string, v any) (bool, error) {
	data, err := readFile(path)
	if data == nil || err != nil {
		return false, err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return false, broken(path, reasonJSON(err))
	}
	return true, nil
}

func reasonJSON(err error) string {
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		return fmt.Sprintf("%v (byte %d)", err, syntax.Offset)
	}
	return err.Error()
}

// broken is the error for a file that is there but cannot be used.
func broken(path, reason string) *fault.Error {
	return fault.New(fault.Tokenizer, "%s is corrupt or of an unknown form: %s", path, reason).
		WithHint("Delete it and download it again; if it still fails, it was made for a newer tokenizers library.")
}
