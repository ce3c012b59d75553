package fault

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

func sample() *Error {
	e := New(Op, "sizes %v and %v do not match", []int{2, 3}, []int{4}).WithHint("Reshape one of them.")
	e.Path, e.Op, e.Node, e.Invoke, e.Step = "transformer.h.5", "aten::add", 3, 1, 2
	e.Pos, e.Other = Pos{"demo.py", 12, "main"}, Pos{"demo.py", 7, ""}
	return e.WithCause(errors.New("from torch"))
}

func TestError(t *testing.T) {
	require.Equal(t, `OpError: sizes [2 3] and [4] do not match
  module: transformer.h.5
  op: aten::add
  invoke: 1
  step: 2
  line: demo.py:12
  earlier line: demo.py:7
  cause: from torch
  Reshape one of them.`, sample().Error())
	require.Equal(t, "InputError: no prompt", New(Input, "no prompt").Error())
	require.Equal(t, "InternalError: disk full", As(errors.New("disk full")).Error(), "a cause is told once")
	first := New(Op, "no")
	first.Step = 0
	require.Equal(t, "OpError: no", first.Error(), "outside of a loop every step is 0")
}

func TestJSON(t *testing.T) {
	text, err := json.Marshal(sample())
	require.NoError(t, err)
	var back Error
	require.NoError(t, json.Unmarshal(text, &back))
	require.Equal(t, sample().Error(), back.Error())
	text, err = json.Marshal(New(Input, "no prompt"))
	require.NoError(t, err)
	require.JSONEq(t, `{"code": "InputError", "message": "no prompt"}`, string(text), "what is unknown is left out")
	require.Error(t, json.Unmarshal([]byte(`[]`), &back))

	first := New(Op, "no") // node, invoke and step 0 are known
	first.Node, first.Invoke, first.Step = 0, 0, 0
	text, err = json.Marshal(first)
	require.NoError(t, err)
	require.JSONEq(t, `{"code": "OpError", "message": "no", "node": 0, "invoke": 0, "step": 0}`, string(text))
	require.NoError(t, json.Unmarshal(text, &back))
	require.Equal(t, *first, back)
}

// TestJSONFields holds every field to its name in capi/nng.h.
func TestJSONFields(t *testing.T) {
	text, err := json.Marshal(sample())
	require.NoError(t, err)
	require.JSONEq(t, `{"code": "OpError", "message": "sizes [2 3] and [4] do not match", "hint": "Reshape one of them.",
		"path": "transformer.h.5", "op": "aten::add", "node": 3, "invoke": 1, "step": 2, "file": "demo.py", "line": 12,
		"func": "main", "other_file": "demo.py", "other_line": 7, "cause": "from torch"}`, string(text))
	var back Error
	require.NoError(t, json.Unmarshal([]byte(`{"code": "OpError", "message": "m", "of_a_later_version": {}}`), &back))
	require.Equal(t, *New(Op, "m"), back)
	require.NoError(t, json.Unmarshal([]byte(`{"code": "OpError", "message": "line\nNUL\u0000"}`), &back))
	require.Equal(t, "line\nNUL\x00", back.Message)
	text, err = json.Marshal(New(Op, "%s", "not UTF-8: \xff"))
	require.NoError(t, err, "messages may quote what a stranger sent")
	require.True(t, json.Valid(text))
}

func TestAs(t *testing.T) {
	require.Nil(t, As(nil))
	e := sample()
	require.Same(t, e, As(fmt.Errorf("while running: %w", e)))
	require.EqualError(t, errors.Unwrap(e), "from torch")
	other := As(errors.New("plain"))
	require.Equal(t, Internal, other.Code)
	require.Equal(t, -1, other.Node)
}
