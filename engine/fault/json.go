package fault

import "encoding/json"

// wire is the JSON form of an error, as capi/nng.h describes it; unknown fields are left out. A
// node, invoke or step of 0 is known, so those are pointers.
type wire struct {
	Code      Code   `json:"code"`
	Message   string `json:"message"`
	Hint      string `json:"hint,omitempty"`
	Path      string `json:"path,omitempty"`
	Op        string `json:"op,omitempty"`
	Node      *int   `json:"node,omitempty"`
	Invoke    *int   `json:"invoke,omitempty"`
	Step      *int   `json:"step,omitempty"`
	File      string `json:"file,omitempty"`
	Line      int    `json:"line,omitempty"`
	Func      string `json:"func,omitempty"`
	OtherFile string `json:"other_file,omitempty"`
	OtherLine int    `json:"other_line,omitempty"`
	Cause     string `json:"cause,omitempty"`
}

func known(n int) *int {
	if n < 0 {
		return nil
	}
	return &n
}

// MarshalJSON writes the error in its JSON form.
func (e *Error) MarshalJSON() ([]byte, error) {
	w := wire{Code: e.Code, Message: e.Message, Hint: e.Hint, Path: e.Path, Op: e.Op,
		Node: known(e.Node), Invoke: known(e.Invoke), Step: known(e.Step),
		File: e.Pos.File, Line: e.Pos.Line, Func: e.Pos.Func, OtherFile: e.Other.File, OtherLine: e.Other.Line}
	if e.Cause != nil {
		w.Cause = e.Cause.Error()
	}
	return json.Marshal(w)
}

// UnmarshalJSON reads the JSON form; the cause comes back as its text. Fields it does not know, which
// a newer engine may send, are passed over.
func (e *Error) UnmarshalJSON(data []byte) error {
	var w wire
	if err := json.Unmarshal(data, &w); err != nil {
		return err
	}
	number := func(n *int) int {
		if n == nil {
			return -1
		}
		return *n
	}
	*e = Error{Code: w.Code, Message: w.Message, Hint: w.Hint, Path: w.Path, Op: w.Op,
		Node: number(w.Node), Invoke: number(w.Invoke), Step: number(w.Step),
		Pos: Pos{File: w.File, Line: w.Line, Func: w.Func}, Other: Pos{File: w.OtherFile, Line: w.OtherLine}}
	if w.Cause != "" {
		e.Cause = text(w.Cause)
	}
	return nil
}

// text is an error of which only the message is left.
type text string

func (t text) Error() string { return string(t) }
