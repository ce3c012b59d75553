package token

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"

	daulet "github.com/daulet/tokenizers"
	"github.com/stretchr/testify/require"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// byteAlphabet gives GPT-2's letter for each byte: printable bytes stand for themselves, the others
// for the code points from 256 up.
func byteAlphabet() [256]string {
	var letters [256]string
	next := rune(256)
	for b := range letters {
		r := rune(b)
		if !(r >= '!' && r <= '~' || r >= 0xA1 && r <= 0xAC || r >= 0xAE && r <= 0xFF) {
			r = next
			next++
		}
		letters[b] = string(r)
	}
	return letters
}

func write(t testing.TB, dir, name, text string) {
	t.Helper()
	require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
}

// gpt2Dir writes a small GPT-2 style directory (vocab.json and merges.txt): 256 bytes, then "he"
// (256), "ll" (257), "hell" (258), "hello" (259), "Ġhello" (260), "<|endoftext|>" (261).
func gpt2Dir(t testing.TB) string {
	dir := t.TempDir()
	vocab := map[string]int{}
	for b, letter := range byteAlphabet() {
		vocab[letter] = b
	}
	merges := []string{"h e", "l l", "he ll", "hell o", "Ġ hello"}
	for i, merge := range merges {
		vocab[strings.ReplaceAll(merge, " ", "")] = 256 + i
	}
	vocab[endOfText] = 261
	text, err := json.Marshal(vocab)
	require.NoError(t, err)
	write(t, dir, fileVocab, string(text))
	write(t, dir, fileMerges, "#version: 0.2\n"+strings.Join(merges, "\n")+"\n")
	return dir
}

// wordDir writes a tokenizer.json of four words.
func wordDir(t testing.TB, vocabExtra string) string {
	dir := t.TempDir()
	write(t, dir, fileTokenizer, `{"version": "1.0", "added_tokens": [], "normalizer": {"type": "Lowercase"},
		"pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
		"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
		"padding": {"strategy": {"Fixed": 1000000000000}, "direction": "Right", "pad_to_multiple_of": null,
		            "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"},
		"model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "b": 2, "<s>": 3`+vocabExtra+`}, "unk_token": "<unk>"}}`)
	return dir
}

func open(t testing.TB, dir string) *Tokenizer {
	t.Helper()
	tok, err := Open(dir)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, tok.Close()) })
	return tok
}

// shared finds a real tokenizer, or skips.
func sharedDir(t testing.TB, name string) string {
	t.Helper()
	root := os.Getenv("NNSIGHT_GO_SHARED")
	if root == "" {
		root = filepath.Join("..", "..", "..", "shared", "models")
	} else if _, err := os.Stat(filepath.Join(root, "models")); err == nil {
		root = filepath.Join(root, "models")
	}
	dir := filepath.Join(root, name)
	if _, err := os.Stat(filepath.Join(dir, fileTokenizer)); err != nil {
		t.Skipf("%s is not there", name)
	}
	return dir
}

func requireFault(t testing.TB, err error, code fault.Code, parts ...string) {
	t.Helper()
	var e *fault.Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, code, e.Code)
	for _, part := range parts {
		require.Contains(t, err.Error(), part)
	}
}

func TestGPT2Files(t *testing.T) {
	tok := open(t, gpt2Dir(t))
	require.Equal(t, "BPE", tok.Model())
	require.Equal(t, 262, tok.VocabSize())
	require.Equal(t, 262, tok.Len())

	e, err := tok.Encode("hello héllo\x00 <|endoftext|>", true)
	require.NoError(t, err)
	letters := byteAlphabet()
	want := []int64{259, ' ', 'h', 0xC3, 0xA9, 257, 'o', 0, ' ', 261}
	require.Equal(t, want, e.IDs)
	require.Equal(t, []string{"hello", "Ġ", "h", letters[0xC3], letters[0xA9], "ll", "o", letters[0], "Ġ", endOfText}, e.Tokens)
	// Offsets count characters: both bytes of é cover character 7.
	require.Equal(t, [][2]int{{0, 5}, {5, 6}, {6, 7}, {7, 8}, {7, 8}, {8, 10}, {10, 11}, {11, 12}, {12, 13}, {13, 26}}, e.Offsets)
	require.Equal(t, make([]int, 10), e.SpecialMask)

	ids, err := tok.IDs("hello héllo\x00 <|endoftext|>")
	require.NoError(t, err)
	require.Equal(t, want, ids)
	text, err := tok.Decode(want, false)
	require.NoError(t, err)
	require.Equal(t, "hello héllo\x00 <|endoftext|>", text)
	text, err = tok.Decode(want, true)
	require.NoError(t, err)
	require.Equal(t, "hello héllo\x00 ", text)

	s := tok.Special()
	require.Equal(t, &SpecialToken{endOfText, 261}, s.BOS)
	require.Equal(t, &SpecialToken{endOfText, 261}, s.EOS)
	require.Nil(t, s.PAD)
}

func TestLookups(t *testing.T) {
	tok := open(t, gpt2Dir(t))
	id, ok := tok.TokenToID("Ġhello")
	require.True(t, ok)
	require.EqualValues(t, 260, id)
	_, ok = tok.TokenToID("no such token")
	require.False(t, ok)
	token, ok := tok.IDToToken(258)
	require.True(t, ok)
	require.Equal(t, "hell", token)
	for _, id := range []int64{262, -1, 1 << 32, 1<<32 + 1, 1<<32 - 1, 1<<63 - 1, -1 << 63} {
		_, ok := tok.IDToToken(id)
		require.False(t, ok, id)
		_, err := tok.Decode([]int64{0, id}, false)
		requireFault(t, err, fault.Tokenizer, strconv.FormatInt(id, 10), "262 tokens")
	}
	vocab, err := tok.Vocab()
	require.NoError(t, err)
	require.Len(t, vocab, 262)
	for token, id := range vocab {
		back, ok := tok.IDToToken(id)
		require.True(t, ok)
		require.Equal(t, token, back)
	}
}

func TestPair(t *testing.T) {
	e, err := open(t, gpt2Dir(t)).EncodePair("hello", "é", true)
	require.NoError(t, err)
	require.Equal(t, []int64{259, 0xC3, 0xA9}, e.IDs)
	require.Equal(t, []int{0, 1, 1}, e.TypeIDs)
	require.Equal(t, [][2]int{{0, 5}, {0, 1}, {0, 1}}, e.Offsets)
}

// The truncation and the padding to 10^12 tokens that the file asks for are not done.
func TestTruncationAndPaddingAreIgnored(t *testing.T) {
	ids, err := open(t, wordDir(t, "")).IDs("A b a zzz")
	require.NoError(t, err)
	require.Equal(t, []int64{1, 2, 1, 0}, ids)
}

func TestConfig(t *testing.T) {
	dir := wordDir(t, "")
	write(t, dir, fileConfig, `{"bos_token": {"content": "<s>", "lstrip": false, "normalized": false}, "eos_token": "</s>",
		"pad_token": null, "unk_token": "<unk>", "add_bos_token": true, "padding_side": "left",
		"model_max_length": 1000000000000000019884624838656, "chat_template": [{"name": "default", "template": "D"},
		{"name": "tools", "template": "T"}], "additional_special_tokens": ["<x>"],
		"clean_up_tokenization_spaces": true, "unused": {"a": 1}}`)
	tok := open(t, dir)
	require.Equal(t, 4, tok.VocabSize())
	require.Equal(t, 6, tok.Len()) // </s> and <x> were added
	s := tok.Special()
	require.Equal(t, &SpecialToken{"<s>", 3}, s.BOS)
	require.Equal(t, &SpecialToken{"</s>", 4}, s.EOS)
	require.Equal(t, []SpecialToken{{"<x>", 5}}, s.Additional)
	require.Nil(t, s.PAD)
	require.Equal(t, "left", tok.PaddingSide())
	require.Equal(t, "right", tok.TruncationSide())
	require.Zero(t, tok.ModelMaxLength())
	require.Equal(t, "D", tok.ChatTemplate())
	require.Equal(t, map[string]string{"default": "D", "tools": "T"}, tok.ChatTemplates())

	e, err := tok.Encode("a <x> B", true)
	require.NoError(t, err)
	require.Equal(t, []int64{1, 5, 2}, e.IDs) // tokenizer.json has no post-processor, so no <s>
	require.False(t, tok.AddsBOS())
	text, err := tok.Decode(e.IDs, true)
	require.NoError(t, err)
	require.Equal(t, "a b", text)

	write(t, dir, fileTemplate, "from a file")
	require.Equal(t, "from a file", open(t, dir).ChatTemplate())

	var described map[string]any
	text2, err := json.Marshal(tok)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text2, &described))
	require.Equal(t, "WordLevel", described["model"])
	require.Nil(t, described["model_max_length"])
	require.Equal(t, map[string]any{"token": "</s>", "id": 4.0}, described["special_tokens"].(map[string]any)["eos_token"])
}

func TestAddBOSOfGPT2Files(t *testing.T) {
	dir := gpt2Dir(t)
	write(t, dir, fileConfig, `{"add_bos_token": true, "add_eos_token": true, "eos_token": "</s>"}`)
	tok := open(t, dir)
	e, err := tok.Encode("hello", true)
	require.NoError(t, err)
	require.Equal(t, []int64{261, 259, 262}, e.IDs)
	require.Equal(t, []int{1, 0, 1}, e.SpecialMask)
	require.True(t, tok.AddsBOS() && tok.AddsEOS())
	ids, err := tok.EncodeIDs("hello", false)
	require.NoError(t, err)
	require.Equal(t, []int64{259}, ids)
	e, err = tok.EncodePair("hello", "hello", true)
	require.NoError(t, err)
	require.Equal(t, []int64{261, 259, 262, 261, 259, 262}, e.IDs)
	require.Equal(t, []int{0, 0, 0, 1, 1, 1}, e.TypeIDs)
}

func TestSpecialTokensMapWins(t *testing.T) {
	dir := wordDir(t, "")
	write(t, dir, fileConfig, `{"eos_token": "a"}`)
	write(t, dir, fileSpecial, `{"eos_token": {"content": "b"}}`)
	require.Equal(t, "b", open(t, dir).Special().EOS.Content)
	// ... but not over a configuration of the newer kind, which lists its added tokens.
	write(t, dir, fileConfig, `{"eos_token": "a", "added_tokens_decoder": {"4": {"content": "<four>", "special": true}}}`)
	tok := open(t, dir)
	require.Equal(t, "a", tok.Special().EOS.Content)
	token, _ := tok.IDToToken(4)
	require.Equal(t, "<four>", token)
}

func TestInvalidUTF8(t *testing.T) {
	tok := open(t, gpt2Dir(t))
	_, err := tok.Encode("ab\xff", true)
	requireFault(t, err, fault.Tokenizer, "UTF-8", "byte 2")
	_, err = tok.IDs("ab\xff")
	requireFault(t, err, fault.Tokenizer, "UTF-8")
	_, ok := tok.TokenToID("\xff")
	require.False(t, ok)
}

func TestEmpty(t *testing.T) {
	tok := open(t, gpt2Dir(t))
	e, err := tok.Encode("", true)
	require.NoError(t, err)
	require.Empty(t, e.IDs)
	text, err := json.Marshal(e)
	require.NoError(t, err)
	require.JSONEq(t, `{"ids": [], "tokens": [], "offsets": [], "special_tokens_mask": [], "type_ids": []}`, string(text))
	decoded, err := tok.Decode(nil, false)
	require.NoError(t, err)
	require.Empty(t, decoded)
}

func TestBadDirectories(t *testing.T) {
	good, err := os.ReadFile(filepath.Join(wordDir(t, ""), fileTokenizer))
	require.NoError(t, err)
	for name, c := range map[string]struct {
		files map[string]string
		want  []string
	}{
		"empty directory": {nil, []string{"has no tokenizer.json", "Download"}},
		"sentencepiece":   {map[string]string{fileSentence: "x"}, []string{"SentencePiece", "save_pretrained"}},
		"empty file":      {map[string]string{fileTokenizer: ""}, []string{fileTokenizer, "is empty", "again"}},
		"truncated":       {map[string]string{fileTokenizer: string(good[:len(good)/2])}, []string{fileTokenizer, "corrupt"}},
		"not JSON":        {map[string]string{fileTokenizer: "\x00\xff"}, []string{fileTokenizer, "corrupt"}},
		"other JSON":      {map[string]string{fileTokenizer: "[]"}, []string{fileTokenizer}},
		// The message holds the token, NUL and all: daulet's own code would abort the process here.
		"NUL in a message": {map[string]string{fileTokenizer: `{"version": "1.0", "added_tokens": [], "model":
			{"type": "BPE", "vocab": {"a": 0}, "merges": ["a\u0000 b"]}}`}, []string{fileTokenizer, `a\0`}},
		"bad config":    {map[string]string{fileTokenizer: string(good), fileConfig: `{"bos_token": `}, []string{fileConfig, "corrupt"}},
		"bad bos":       {map[string]string{fileTokenizer: string(good), fileConfig: `{"bos_token": 3}`}, []string{fileConfig, "bos_token"}},
		"bad side":      {map[string]string{fileTokenizer: string(good), fileConfig: `{"padding_side": "up"}`}, []string{fileConfig, "up"}},
		"bad map":       {map[string]string{fileTokenizer: string(good), fileSpecial: `[`}, []string{fileSpecial}},
		"bad template":  {map[string]string{fileTokenizer: string(good), fileConfig: `{"chat_template": 3}`}, []string{"chat_template"}},
		"bad id":        {map[string]string{fileTokenizer: string(good), fileConfig: `{"added_tokens_decoder": {"4x": {}}}`}, []string{"4x"}},
		"bad vocab":     {map[string]string{fileVocab: `{"a": "b"}`, fileMerges: ""}, []string{fileVocab}},
		"bad merges":    {map[string]string{fileVocab: `{"a": 0}`, fileMerges: "#version\na\n"}, []string{fileMerges, "line 2"}},
		"unknown merge": {map[string]string{fileVocab: `{"a": 0}`, fileMerges: "a b\n"}, []string{fileVocab}},
		"other class":   {map[string]string{fileVocab: `{"a": 0}`, fileMerges: "", fileConfig: `{"tokenizer_class": "RobertaTokenizer"}`}, []string{"RobertaTokenizer"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for file, text := range c.files {
				write(t, dir, file, text)
			}
			_, err := Open(dir)
			requireFault(t, err, fault.Tokenizer, append(c.want, dir)...)
			require.NotEmpty(t, fault.As(err).Hint)
		})
	}
	_, err = Open(filepath.Join(t.TempDir(), "absent"))
	requireFault(t, err, fault.Tokenizer, "absent", "not a directory")
}

func TestPanicInRustIsAnError(t *testing.T) {
	requireFault(t, rustPanic(), fault.Tokenizer, "on purpose", `\0`, "nng.rs")
}

func TestClose(t *testing.T) {
	tok, err := Open(gpt2Dir(t))
	require.NoError(t, err)
	stream := tok.DecodeStream(false)
	require.NoError(t, tok.Close())
	require.NoError(t, tok.Close())
	_, err = tok.Encode("a", true)
	requireFault(t, err, fault.Tokenizer, "closed")
	_, err = tok.IDs("a")
	requireFault(t, err, fault.Tokenizer, "closed")
	_, err = tok.Decode([]int64{1}, false)
	requireFault(t, err, fault.Tokenizer, "closed")
	_, err = tok.Tokens([]int64{1, -1})
	requireFault(t, err, fault.Tokenizer, "closed")
	_, err = tok.Vocab()
	requireFault(t, err, fault.Tokenizer, "closed")
	_, _, err = tok.Lookup("a")
	requireFault(t, err, fault.Tokenizer, "closed")
	_, err = stream.Step(1)
	requireFault(t, err, fault.Tokenizer, "closed")
	require.Equal(t, 262, tok.Len())
	require.NoError(t, (&Tokenizer{}).Close())
}

func TestConcurrentUseAndClose(t *testing.T) {
	tok, err := Open(gpt2Dir(t))
	require.NoError(t, err)
	want, err := tok.IDs("hello hello world")
	require.NoError(t, err)
	var wg sync.WaitGroup
	start := make(chan struct{})
	for g := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			<-start
			for i := range 300 {
				if g == 0 && i == 200 {
					tok.Close()
				}
				ids, err := tok.IDs("hello hello world")
				if err != nil {
					if !strings.Contains(err.Error(), "closed") {
						t.Error(err)
					}
					return
				}
				if !reflect.DeepEqual(want, ids) {
					t.Errorf("ids %v, want %v", ids, want)
				}
			}
		}()
	}
	close(start)
	wg.Wait()
}

// randomText draws code points of all planes, controls and NUL among them.
func randomText(r *rand.Rand) string {
	var b strings.Builder
	for range r.Intn(40) {
		switch r.Intn(6) {
		case 0:
			b.WriteByte(byte(r.Intn(128)))
		case 1:
			b.WriteRune(rune(r.Intn(0xD800)))
		case 2:
			b.WriteRune(rune(0x10000 + r.Intn(0x100000)))
		case 3:
			b.WriteString([]string{" ", "  ", "\n\t", "hello", endOfText, "<s>", "é", "e\u0301", "👩‍👩‍👧", "\u200d", "\uFFFD"}[r.Intn(11)])
		case 4:
			b.WriteString(strings.Repeat(" ", r.Intn(9)))
		default:
			b.WriteRune(rune('a' + r.Intn(26)))
		}
	}
	return b.String()
}

// The pieces of a stream add up to the text decoded at once.
func TestDecodeStream(t *testing.T) {
	dirs := map[string]string{"small": gpt2Dir(t)}
	for _, name := range []string{"gpt2-tokenizer", "stories260K"} {
		t.Run(name, func(t *testing.T) { dirs[name] = sharedDir(t, name) })
	}
	for name, dir := range dirs {
		tok := open(t, dir)
		r := rand.New(rand.NewSource(1))
		for range 500 {
			text := randomText(r)
			ids, err := tok.IDs(text)
			require.NoError(t, err)
			for _, skip := range []bool{false, true} {
				want, err := tok.Decode(ids, skip)
				require.NoError(t, err)
				stream := tok.DecodeStream(skip)
				var got strings.Builder
				for _, id := range ids {
					piece, err := stream.Step(id)
					require.NoError(t, err)
					require.True(t, utf8.ValidString(piece))
					got.WriteString(piece)
				}
				rest, err := stream.Flush()
				require.NoError(t, err)
				got.WriteString(rest)
				require.Equal(t, want, got.String(), "%s: %q skip=%v ids=%v", name, text, skip, ids)
			}
		}
	}
}

func TestDecodeStreamHoldsBack(t *testing.T) {
	stream := open(t, gpt2Dir(t)).DecodeStream(false)
	step := func(id int64) string {
		piece, err := stream.Step(id)
		require.NoError(t, err)
		return piece
	}
	require.Equal(t, "hello", step(259))
	require.Equal(t, "", step(0xC3))
	_, err := stream.Step(9999)
	requireFault(t, err, fault.Tokenizer, "9999")
	require.Equal(t, "é", step(0xA9)) // the failed id does not count
	require.Equal(t, "", step(0xF0))
	rest, err := stream.Flush()
	require.NoError(t, err)
	require.Equal(t, "\uFFFD", rest)
	require.Equal(t, " hello", step(260))
}

// Ours and daulet's functions work on one object and agree where daulet's can (no NUL).
func TestAgreesWithDaulet(t *testing.T) {
	tok := open(t, sharedDir(t, "gpt2-tokenizer"))
	r := rand.New(rand.NewSource(2))
	for range 500 {
		text := strings.ReplaceAll(randomText(r), "\x00", "")
		e, err := tok.Encode(text, true)
		require.NoError(t, err)
		theirs := tok.inner.EncodeWithOptions(text, true, daulet.WithReturnAllAttributes())
		require.Len(t, theirs.IDs, len(e.IDs))
		for i, id := range theirs.IDs {
			require.EqualValues(t, id, e.IDs[i])
			require.Equal(t, theirs.Tokens[i], e.Tokens[i])
			// Theirs are bytes, ours characters.
			require.Equal(t, utf8.RuneCountInString(text[:runeStart(text, theirs.Offsets[i][0])]), e.Offsets[i][0])
		}
		mine, err := tok.Decode(e.IDs, false)
		require.NoError(t, err)
		require.Equal(t, tok.inner.Decode(theirs.IDs, false), mine)
		require.Equal(t, text, mine)
	}
	require.EqualValues(t, tok.inner.VocabSize(), tok.Len())
}

// runeStart moves a byte offset back to the start of its character.
func runeStart(s string, at uint) int {
	i := int(at)
	for i > 0 && i < len(s) && !utf8.RuneStart(s[i]) {
		i--
	}
	return i
}

func TestGPT2KnownIDs(t *testing.T) {
	tok := open(t, sharedDir(t, "gpt2-tokenizer"))
	ids, err := tok.IDs("Hello world")
	require.NoError(t, err)
	require.Equal(t, []int64{15496, 995}, ids)
	require.Equal(t, 1024, tok.ModelMaxLength())

	// The same two files without tokenizer.json give the same tokenizer.
	dir := t.TempDir()
	for _, name := range []string{fileVocab, fileMerges} {
		data, err := os.ReadFile(filepath.Join(tok.Dir(), name))
		require.NoError(t, err)
		write(t, dir, name, string(data))
	}
	built := open(t, dir)
	r := rand.New(rand.NewSource(3))
	for range 500 {
		text := randomText(r)
		want, err := tok.Encode(text, true)
		require.NoError(t, err)
		got, err := built.Encode(text, true)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	require.Equal(t, tok.Special(), built.Special())
}

// rss gives the resident memory of this process, in bytes.
func rss(t *testing.T) int {
	data, err := os.ReadFile("/proc/self/statm")
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("no /proc on this system")
	}
	require.NoError(t, err)
	pages, err := strconv.Atoi(strings.Fields(string(data))[1])
	require.NoError(t, err)
	return pages * os.Getpagesize()
}

func TestNoLeak(t *testing.T) {
	dir := gpt2Dir(t)
	bad := t.TempDir()
	write(t, bad, fileTokenizer, `{"version": "1.0"`)
	round := func() {
		tok, err := Open(dir)
		require.NoError(t, err)
		e, err := tok.Encode("hello wörld, hello", true)
		require.NoError(t, err)
		_, err = tok.Decode(e.IDs, false)
		require.NoError(t, err)
		_, err = tok.Vocab()
		require.NoError(t, err)
		_, err = tok.Decode([]int64{1 << 20}, false)
		require.Error(t, err)
		require.NoError(t, tok.Close())
		_, err = Open(bad)
		require.Error(t, err)
	}
	settle := func() int {
		runtime.GC()
		debug.FreeOSMemory()
		return rss(t)
	}
	for range 200 {
		round()
	}
	before := settle()
	for range 1000 {
		round()
	}
	// A tokenizer of this size holds about 100 kB: a leak of one in ten would show.
	require.Less(t, settle()-before, 8<<20)
}

func FuzzOpen(f *testing.F) {
	good, err := os.ReadFile(filepath.Join(wordDir(f, ""), fileTokenizer))
	require.NoError(f, err)
	f.Add(good, []byte(`{"bos_token": "<s>", "add_bos_token": true}`))
	f.Add([]byte(`{"version": "1.0", "added_tokens": [{"id": 9, "content": "x", "special": true, "single_word": false,
		"lstrip": true, "rstrip": true, "normalized": true}], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2},
		"merges": ["a b"], "byte_fallback": true}, "decoder": {"type": "ByteFallback"}}`), []byte(`{}`))
	f.Add([]byte(`{"version": "1.0", "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]},
		"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}}`), []byte(`{"eos_token": {"content": "</s>"}}`))
	f.Add([]byte(`{"version": "1.0", "model": {"type": "WordPiece", "vocab": {"[UNK]": 0, "##a": 1}, "unk_token": "[UNK]",
		"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}}`), []byte(`{"added_tokens_decoder": {"7": {"content": "q"}}}`))
	f.Fuzz(func(t *testing.T, tokenizer, config []byte) {
		dir := t.TempDir()
		write(t, dir, fileTokenizer, string(tokenizer))
		write(t, dir, fileConfig, string(config))
		tok, err := Open(dir)
		if err != nil {
			requireFault(t, err, fault.Tokenizer, dir)
			return
		}
		defer tok.Close()
		e, err := tok.Encode("a b\x00 é <s>", true)
		if err != nil {
			requireFault(t, err, fault.Tokenizer)
			return
		}
		if _, err := tok.Decode(e.IDs, true); err != nil {
			requireFault(t, err, fault.Tokenizer)
		}
	})
}

func BenchmarkIDs(b *testing.B) {
	tok := open(b, sharedDir(b, "gpt2-tokenizer"))
	text := strings.Repeat("The quick brown fox jumps over the lazy dog. ", 20)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		if _, err := tok.IDs(text); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpen(b *testing.B) {
	dir := sharedDir(b, "gpt2-tokenizer")
	for b.Loop() {
		tok, err := Open(dir)
		if err != nil {
			b.Fatal(err)
		}
		tok.Close()
	}
}

func ExampleTokenizer_Encode() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	var file bytes.Buffer
	file.WriteString(`{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"?": 0, "a": 1, "fox": 2}, "unk_token": "?"},
		"pre_tokenizer": {"type": "WhitespaceSplit"}}`)
	if err := os.WriteFile(filepath.Join(dir, "tokenizer.json"), file.Bytes(), 0o600); err != nil {
		panic(err)
	}
	t, err := Open(dir)
	if err != nil {
		panic(err)
	}
	defer t.Close()
	e, err := t.Encode("a fox ran", true)
	if err != nil {
		panic(err)
	}
	fmt.Println(e.IDs, e.Tokens, e.Offsets)
	// Output: [1 2 0] [a fox ?] [[0 1] [2 5] [6 9]]
}
