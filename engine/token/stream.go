package token

import "strings"

// DecodeStream turns ids that come one at a time into pieces of text. It belongs to one goroutine.
type DecodeStream struct {
	t    *Tokenizer
	skip bool
	// window holds the tokens since the last but one cut: decoding starts a little before the new
	// token, since decoders treat the first token otherwise (a leading space is lost, say).
	window []int64
	given  string // the part of the window's text that was handed out
	cut    int    // how many tokens of the window that part covers
}

// DecodeStream starts a stream; skipSpecial leaves special tokens out.
func (t *Tokenizer) DecodeStream(skipSpecial bool) *DecodeStream {
	return &DecodeStream{t: t, skip: skipSpecial}
}

// Step takes the next id and gives the text that became certain. It is "" while the tokens so far
// end inside a character of several bytes. After an error the id does not count.
func (d *DecodeStream) Step(id int64) (string, error) {
	window := append(d.window, id)
	text, err := d.t.Decode(window, d.skip)
	if err != nil {
		return "", err
	}
	if len(text) <= len(d.given) || strings.HasSuffix(text, "\uFFFD") {
		d.window = window
		return "", nil
	}
	rest := append([]int64(nil), window[d.cut:]...)
	given, err := d.t.Decode(rest, d.skip)
	if err != nil {
		return "", err
	}
	piece := text[shared(text, d.given):]
	d.window, d.given, d.cut = rest, given, len(rest)
	return piece, nil
}

// Flush ends the stream and gives the text still held back: U+FFFD for bytes of a character that
// never ended. The stream can be used again, for a new text.
func (d *DecodeStream) Flush() (string, error) {
	text, err := d.t.Decode(d.window, d.skip)
	if err != nil {
		return "", err
	}
	piece := text[shared(text, d.given):]
	d.window, d.given, d.cut = nil, "", 0
	return piece, nil
}

// shared gives the length of the common prefix, which is all of given but for decoders that change
// earlier text when later tokens come.
func shared(text, given string) int {
	if strings.HasPrefix(text, given) {
		return len(given)
	}
	n := 0
	for _, r := range text {
		if !strings.HasPrefix(given[n:], string(r)) {
			break
		}
		n += len(string(r))
	}
	return n
}
