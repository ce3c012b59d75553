package weights

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

const (
	singleFile = "model.safetensors"
	indexFile  = "model.safetensors.index.json"
	maxJSON    = 64 << 20 // the most bytes of a JSON file of a model directory
)

var errNotRegular = errors.New("it is not a regular file")

// index says which files of a directory hold weights.
type index struct {
	files []string          // names, sorted
	place map[string]string // tensor -> file, where an index says so
}

// readIndex finds the weights of a directory. A single file comes before shards, as in transformers.
func readIndex(dir string) (*index, error) {
	if stat, err := os.Stat(dir); err != nil || !stat.IsDir() {
		return nil, noDirectory(dir, err)
	}
	// Lstat: a broken link, as in a damaged hub cache, is an error of its own rather than no weights
	if _, err := os.Lstat(filepath.Join(dir, singleFile)); err == nil {
		return &index{files: []string{singleFile}}, nil
	}
	file := filepath.Join(dir, indexFile)
	text, err := readSmall(file)
	if os.IsNotExist(err) {
		return nil, noWeights(dir)
	}
	if err != nil {
		return nil, fault.New(fault.ModelLoad, "%s cannot be read", file).WithCause(err)
	}
	var parsed struct {
		WeightMap map[string]string `json:"weight_map"`
	}
	if err := decode(file, text, &parsed); err != nil {
		return nil, err
	}
	if len(parsed.WeightMap) == 0 {
		return nil, fault.New(fault.ModelLoad, "%s names no tensors", file).
			WithHint(`It needs a "weight_map" from the names of tensors to the names of files.`)
	}
	x := &index{place: parsed.WeightMap}
	for tensor, name := range parsed.WeightMap {
		// a name with a path in it could make us read any file of the machine
		if name != filepath.Base(name) || strings.ContainsAny(name, "\\\x00") || !strings.HasSuffix(name, ".safetensors") {
			return nil, fault.New(fault.ModelLoad, "%s puts tensor %q into %q, which is not a safetensors file of the same directory",
				file, tensor, name).WithHint("Shards stand beside the index and are named by their file names alone.")
		}
		x.files = append(x.files, name)
	}
	slices.Sort(x.files)
	x.files = slices.Compact(x.files)
	return x, nil
}

// noWeights says what a directory holds instead of weights.
func noWeights(dir string) error {
	e := fault.New(fault.ModelLoad, "%s holds no safetensors weights", dir)
	for _, pattern := range []string{"pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt"} {
		if found, _ := filepath.Glob(filepath.Join(dir, pattern)); len(found) > 0 {
			return e.WithHint("It holds %s, a pickle, which is not read because reading one can run anybody's code. "+
				"Convert it once to safetensors: AutoModelForCausalLM.from_pretrained(directory).save_pretrained(new_directory) "+
				"with transformers.", filepath.Base(found[0]))
		}
	}
	if found, _ := filepath.Glob(filepath.Join(dir, "*.safetensors")); len(found) > 0 {
		return e.WithHint("%s stands there, but neither %s nor %s: rename it if it is the whole model.",
			filepath.Base(found[0]), singleFile, indexFile)
	}
	if found, _ := filepath.Glob(filepath.Join(dir, "*.gguf")); len(found) > 0 {
		return e.WithHint("It holds %s; GGUF is not read. Take the model's safetensors instead.", filepath.Base(found[0]))
	}
	return e.WithHint("%s This one holds %s.", layout, listing(dir))
}

func noDirectory(dir string, cause error) error {
	if cause == nil {
		return fault.New(fault.ModelLoad, "%s is a file, not a model's directory", dir).
			WithHint("Give the directory that the file stands in.")
	}
	if os.IsNotExist(cause) {
		return fault.New(fault.ModelLoad, "there is no directory %s", dir).WithHint("Check its name. %s", layout)
	}
	return fault.New(fault.ModelLoad, "the directory %s cannot be read", dir).WithCause(cause)
}

// listing names the first files of a directory.
func listing(dir string) string {
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) == 0 {
		return "nothing"
	}
	var names []string
	for i, e := range entries {
		if i == 8 {
			names = append(names, fmt.Sprintf("and %d more", len(entries)-i))
			break
		}
		names = append(names, e.Name())
	}
	return strings.Join(names, ", ")
}

// readSmall reads a file that has no reason to be large.
func readSmall(path string) ([]byte, error) {
	f, stat, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if stat.Size() > maxJSON {
		return nil, fmt.Errorf("it has %d bytes, and %d are allowed", stat.Size(), maxJSON)
	}
	return io.ReadAll(io.LimitReader(f, maxJSON))
}

// decode reads a JSON file of a model directory into a struct; errors say where in the file.
func decode(file string, text []byte, into any) error {
	err := json.Unmarshal(text, into)
	if err == nil {
		return nil
	}
	var syntax *json.SyntaxError
	var wrongType *json.UnmarshalTypeError
	switch {
	case len(strings.TrimSpace(string(text))) == 0:
		return fault.New(fault.ModelLoad, "%s is empty", file).WithHint(again)
	case errors.As(err, &syntax):
		line, column := position(text, syntax.Offset)
		return fault.New(fault.ModelLoad, "%s is not JSON: line %d, column %d: %v", file, line, column, err).WithHint(again)
	case errors.As(err, &wrongType) && wrongType.Field != "":
		line, _ := position(text, wrongType.Offset)
		return fault.New(fault.ModelLoad, "%s: line %d: %s cannot be a JSON %s", file, line, wrongType.Field, wrongType.Value).WithHint(again)
	case errors.As(err, &wrongType):
		return fault.New(fault.ModelLoad, "%s holds a JSON %s instead of an object", file, wrongType.Value).WithHint(again)
	}
	return fault.New(fault.ModelLoad, "%s cannot be read: %v", file, err).WithHint(again)
}

// position turns the number of bytes read before an error into the line and column of the last of
// them, both counted from one.
func position(text []byte, offset int64) (line, column int) {
	before := string(text[:max(min(int(offset), len(text))-1, 0)])
	line = 1 + strings.Count(before, "\n")
	return line, 1 + len([]rune(before[strings.LastIndexByte(before, '\n')+1:]))
}
