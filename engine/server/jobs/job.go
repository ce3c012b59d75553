// Package jobs keeps the jobs of a server and their queue: in NATS JetStream, so that they outlive the
// processes that made them, and so that any number of workers may take them.
//
// [Open] a [Store] over a connection; [Store.Submit] queues a request; a worker takes it from
// [Store.Queue], tells how it goes, and stores what came of it; [Store.Result] gives that to its owner.
// A job belongs to one owner, and no other can learn that it exists.
package jobs

import (
	"time"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// State is how far a job has come.
type State string

// The states, in the order in which a job goes through them. The last three are final.
const (
	Received  State = "RECEIVED"
	Queued    State = "QUEUED"
	Running   State = "RUNNING"
	Completed State = "COMPLETED"
	Failed    State = "ERROR"
	Cancelled State = "CANCELLED"
)

// Final reports whether nothing more happens to a job.
func (s State) Final() bool { return s == Completed || s == Failed || s == Cancelled }

// Priority says which jobs are taken first.
type Priority string

// The priorities, the first of them first.
const (
	High   Priority = "high"
	Normal Priority = "normal"
	Low    Priority = "low"
)

// Priorities are all of them, the first of them first.
var Priorities = []Priority{High, Normal, Low}

// Job is what is known of a job.
type Job struct {
	ID       string       `json:"id"`
	Model    string       `json:"model"`
	Kind     string       `json:"kind"` // of the request: "trace", "generate" or "session"
	State    State        `json:"state"`
	Position int          `json:"position,omitempty"` // jobs that are taken before it, while it is queued
	Created  time.Time    `json:"created"`
	Started  *time.Time   `json:"started,omitempty"`
	Ended    *time.Time   `json:"ended,omitempty"`
	Bytes    int64        `json:"bytes,omitempty"` // of the result
	Error    *fault.Error `json:"error,omitempty"`
	Log      []Line       `json:"log,omitempty"` // what its workers say of it
}

// Line is one thing that a worker says of a job, for people.
type Line struct {
	Time time.Time `json:"time"`
	Text string    `json:"text"`
}

// mostLines is how many lines of a job are kept.
const mostLines = 32

// Limits are what its owner's key lets a job take; a zero is no limit beside the worker's own.
type Limits struct {
	Work   float64 `json:"work,omitempty"`   // multiplications
	Memory int64   `json:"memory,omitempty"` // bytes of tensors at the same time
	Output int64   `json:"output,omitempty"` // bytes of a result
}

// record is a job as it is stored.
type record struct {
	Job
	Limits   Limits `json:"limits,omitzero"`
	Owner    string `json:"owner"`
	Attempts int    `json:"attempts"` // how often a worker has begun it
	Class    string `json:"class"`    // its priority, which is a consumer of the queue
	revision uint64
}
