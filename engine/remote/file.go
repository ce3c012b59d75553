package remote

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/weights/safetensors"
)

// Media is the content type of requests and responses.
const Media = "application/vnd.nnsight.tensors"

// A Blob is a tensor as it travels.
type Blob struct {
	DType string  // torch's name
	Shape []int64 // sizes; empty for a scalar
	Data  []byte  // its elements, row-major and little endian; part of the file that it was read from
}

// file is a safetensors file in memory. It may come from anyone.
type file map[string]Blob

func readFile(data []byte) (file, error) {
	infos, err := safetensors.Read(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		return nil, malformed("the file cannot be read: %v", err)
	}
	f := make(file, len(infos))
	for _, i := range infos {
		f[i.Name] = Blob{DType: i.DType, Shape: i.Shape, Data: data[i.Start : i.Start+i.Bytes]}
	}
	return f, nil
}

// text gives the bytes of a tensor that holds some.
func (f file) text(name string) ([]byte, error) {
	b, ok := f[name]
	switch {
	case !ok:
		return nil, malformed("there is no tensor %q in the file", name)
	case b.DType != "uint8" || len(b.Shape) != 1:
		return nil, malformed("tensor %q is %s %v, and not bytes", name, b.DType, b.Shape)
	}
	return b.Data, nil
}

// tensor copies a tensor out of the file.
func (f file) tensor(name string) (aten.Tensor, error) {
	b, ok := f[name]
	if !ok {
		return aten.Tensor{}, malformed("there is no tensor %q in the file", name)
	}
	return aten.FromBytes(b.Data, b.DType, b.Shape...)
}

// A Writer gathers the tensors of a file.
type Writer struct{ entries []safetensors.Entry }

// Bytes adds a tensor that holds bytes.
func (w *Writer) Bytes(name string, data []byte) {
	w.entries = append(w.entries, safetensors.Entry{Name: name, DType: "uint8", Shape: []int64{int64(len(data))}, Data: data})
}

// Tensor adds a copy of a tensor, from whatever device.
func (w *Writer) Tensor(name string, t aten.Tensor) error {
	data, err := t.AppendBytes(nil)
	if err != nil {
		return err
	}
	w.entries = append(w.entries, safetensors.Entry{Name: name, DType: t.DType(), Shape: t.Shape(), Data: data})
	return nil
}

// Add is Tensor with a name of its own, which it gives.
func (w *Writer) Add(t aten.Tensor) (string, error) {
	name := fmt.Sprintf("tensor.%d", len(w.entries))
	return name, w.Tensor(name, t)
}

// File gives the file.
func (w *Writer) File() ([]byte, error) {
	out, err := safetensors.Encode(w.entries)
	if err != nil {
		return nil, fault.New(fault.Remote, "a result cannot be sent: %v", err).WithHint("Convert it, to float32 for example.")
	}
	return out, nil
}

func malformed(format string, args ...any) *fault.Error {
	return fault.New(fault.Remote, "the request is not well formed: "+format, args...).
		WithHint(sameVersion)
}

const sameVersion = "Client and server must speak the same version of the protocol (docs/remote-protocol.md)."

// ReadUpload reads a file of one tensor, called "tensor", that requests name by its hash.
func ReadUpload(data []byte) (Blob, error) {
	f, err := readFile(data)
	if err != nil {
		return Blob{}, err
	}
	b, ok := f["tensor"]
	if !ok || len(f) != 1 {
		return Blob{}, malformed("an upload is a file of one tensor, which is called %q", "tensor")
	}
	return b, nil
}

// Hash is what requests name an uploaded tensor by: SHA-256 over its dtype, its sizes and its elements.
func (b *Blob) Hash() string {
	sizes, _ := json.Marshal(append([]int64{}, b.Shape...))
	h := sha256.New()
	fmt.Fprintf(h, "%s %s\n", b.DType, sizes)
	h.Write(b.Data)
	return hex.EncodeToString(h.Sum(nil))
}

// Head is what a request says of itself, for whoever passes it on without running it.
type Head struct {
	Model string `json:"model"`
	Kind  string `json:"kind"`
}

// ReadHead reads it. The bytes may come from anyone.
func ReadHead(data []byte) (h Head, err error) {
	f, err := readFile(data)
	if err != nil {
		return h, err
	}
	text, err := f.text("request")
	if err != nil {
		return h, err
	}
	if err := json.Unmarshal(text, &h); err != nil {
		return h, malformed("%v", err)
	}
	if h.Model == "" || h.Kind == "" {
		return h, malformed("it names no model, or no kind")
	}
	return h, nil
}
