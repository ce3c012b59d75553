// Package fault is the one error type of the engine.
//
// Every layer returns *Error (or wraps one) so that the message a person reads can say what
// happened, where (module path, invoke, step and the user's own source line), with which shapes,
// and what to do about it. The package imports nothing of ours.
package fault

import (
	"errors"
	"fmt"
	"strings"
)

// Code says which class of error this is. The Python package raises one exception class a code;
// docs/errors has one page a code.
type Code string

// The codes, named as the Python classes they become.
const (
	NotSaved   Code = "NotSavedError"
	OutOfOrder Code = "OutOfOrderError"
	ModulePath Code = "ModulePathError"
	Op         Code = "OpError"
	Gradient   Code = "GradientError"
	ModelLoad  Code = "ModelLoadError"
	Input      Code = "InputError"
	Remote     Code = "RemoteError"
	Cancelled  Code = "CancelledError"
	Graph      Code = "GraphError"
	Tokenizer  Code = "TokenizerError"
	Handle     Code = "HandleError"
	Internal   Code = "InternalError"
)

// Pos is a line of the user's program.
type Pos struct {
	File string
	Line int
	Func string
}

// IsZero reports whether the position is unknown.
func (p Pos) IsZero() bool { return p.File == "" && p.Line == 0 }

func (p Pos) String() string {
	if p.IsZero() {
		return ""
	}
	return fmt.Sprintf("%s:%d", p.File, p.Line)
}

// Error is a failure with its place. Zero fields are unknown and not printed.
type Error struct {
	Code    Code
	Message string // one sentence: what happened, with shapes and dtypes
	Hint    string // what to do, a sentence or empty
	Path    string // module path, as in "transformer.h.5"
	Op      string // the failing op, as in "aten::mm"
	Node    int    // node of the user's graph, -1 where none
	Invoke  int    // invoke the node belongs to, -1 where none
	Step    int    // generation step, -1 where none
	Pos     Pos    // the user's line
	Other   Pos    // a second line the message speaks of (an earlier write, say)
	Cause   error
}

// New makes an error of a code; node, invoke and step are unknown.
func New(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...), Node: -1, Invoke: -1, Step: -1}
}

// Error prints everything that is known on a few lines: the message first, the hint last. A cause
// that the message already tells is not told again.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(string(e.Code))
	b.WriteString(": ")
	b.WriteString(e.Message)
	if e.Path != "" {
		fmt.Fprintf(&b, "\n  module: %s", e.Path)
	}
	if e.Op != "" {
		fmt.Fprintf(&b, "\n  op: %s", e.Op)
	}
	if e.Invoke >= 0 {
		fmt.Fprintf(&b, "\n  invoke: %d", e.Invoke)
	}
	if e.Step > 0 {
		fmt.Fprintf(&b, "\n  step: %d", e.Step)
	}
	if !e.Pos.IsZero() {
		fmt.Fprintf(&b, "\n  line: %s", e.Pos)
	}
	if !e.Other.IsZero() {
		fmt.Fprintf(&b, "\n  earlier line: %s", e.Other)
	}
	if e.Cause != nil && !strings.Contains(e.Message, e.Cause.Error()) {
		fmt.Fprintf(&b, "\n  cause: %v", e.Cause)
	}
	if e.Hint != "" {
		fmt.Fprintf(&b, "\n  %s", e.Hint)
	}
	return b.String()
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Cause }

// WithHint sets what the user can do and returns the error.
func (e *Error) WithHint(format string, args ...any) *Error {
	e.Hint = fmt.Sprintf(format, args...)
	return e
}

// WithCause sets the cause and returns the error.
func (e *Error) WithCause(cause error) *Error {
	e.Cause = cause
	return e
}

// As finds the *Error in a chain, or wraps err as an Internal one. As(nil) is nil.
func As(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return New(Internal, "%v", err).WithCause(err)
}
