package graph

// The wire form of graphs and results is MessagePack; docs/wire.md is its reference. This file has
// what the encoder and the decoder share.

// wireVersion is the first element of an encoded graph.
const wireVersion = 1

// Limits on what the decoder accepts. They bound the work and the memory that bytes from a stranger
// can cause: no encoded graph takes more than a few hundred megabytes once decoded, and a list is
// never given more room than the bytes that are left could fill. Real traces stay far below.
const (
	MaxNodes     = 1 << 20 // nodes of a graph
	MaxArgs      = 1 << 21 // arguments of all nodes together, elements of containers included
	MaxInvokes   = 1 << 16 // invokes of a graph
	MaxTokens    = 1 << 24 // of all rows together, masks included; a row counts as one more
	MaxPositions = 1 << 20 // source lines of a graph
	MaxNesting   = 64      // containers inside containers
	MaxString    = 1 << 20 // bytes of a string
	MaxSteps     = 1 << 30 // calls of one module
)

// The fewest bytes that one element of each list takes.
const (
	minPosition = 4 // list head, two empty strings, a number
	minInvoke   = 3 // list head, two nils
	minNode     = 6 // list head, kind, invoke, position, mode and one part more
)

// Tags of arguments that are not plain MessagePack values: the first element of a list.
const (
	tagRef = iota
	tagList
	tagTuple
	tagDict
	tagSlice
	tagEllipsis
	tagDType
	tagDevice
	tagLayout
	tagMemoryFormat
	tagComplex
	tagObject
)
