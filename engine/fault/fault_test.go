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
}

func TestAs(t *testing.T) {
	require.Nil(t, As(nil))
	e := sample()
	require.Same(t, e, As(fmt.Errorf("while running: %w", e)))
	other := As(errors.New("plain"))
	require.Equal(t, Internal, other.Code)
	require.Equal(t, -1, other.Node)
}
