package weights

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/stretchr/testify/require"
)

// TestMain holds the count of tensors to zero at the end.
func TestMain(m *testing.M) {
	code := m.Run()
	if n := aten.Live(); n != 0 && code == 0 {
		fmt.Println("tensors left at the end:", n)
		code = 1
	}
	os.Exit(code)
}

// source is a float32 tensor to be written.
type source struct {
	name  string
	shape []int64
	first float32 // its elements count up from here
}

// image lays a safetensors file out; shift bytes of padding move its data off alignment.
func image(t testing.TB, shift int, tensors ...source) []byte {
	header, data := map[string]any{}, []byte(nil)
	for _, x := range tensors {
		start, n := len(data), int64(1)
		for _, s := range x.shape {
			n *= s
		}
		for i := range n {
			data = binary.LittleEndian.AppendUint32(data, math.Float32bits(x.first+float32(i)))
		}
		header[x.name] = map[string]any{"dtype": "F32", "shape": x.shape, "data_offsets": []int{start, len(data)}}
	}
	text, err := json.Marshal(header)
	require.NoError(t, err)
	text = append(text, strings.Repeat(" ", 8-len(text)%8+shift)...)
	return append(append(binary.LittleEndian.AppendUint64(nil, uint64(len(text))), text...), data...)
}

func write(t testing.TB, path string, content []byte) {
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, content, 0o644))
}

// sharded writes a directory of two shards: a in the first, b and c in the second.
func sharded(t testing.TB) string {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "model-00001-of-00002.safetensors"), image(t, 0, source{"a", []int64{2, 2}, 1}))
	write(t, filepath.Join(dir, "model-00002-of-00002.safetensors"), image(t, 0, source{"b", []int64{3}, 10}, source{"c", []int64{}, 20}))
	write(t, filepath.Join(dir, indexFile), []byte(`{"metadata": {"total_size": 32}, "weight_map": {
		"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}}`))
	return dir
}

func single(t testing.TB, content []byte) string {
	dir := t.TempDir()
	write(t, filepath.Join(dir, singleFile), content)
	return dir
}

func open(t testing.TB, dir string) *Checkpoint {
	c, err := Open(dir)
	require.NoError(t, err)
	t.Cleanup(c.Close)
	return c
}

func tensor(t testing.TB, c *Checkpoint, name string) aten.Tensor {
	x, err := c.Tensor(name)
	require.NoError(t, err)
	return x
}

func floats(t testing.TB, x aten.Tensor) []float32 {
	out, err := x.Float32s()
	require.NoError(t, err)
	return out
}

// mapped counts the mappings of a file in this process.
func mapped(t testing.TB, path string) int {
	maps, err := os.ReadFile("/proc/self/maps")
	require.NoError(t, err)
	return strings.Count(string(maps), path)
}

// refused holds an error to its code and to what it must say, hint included.
func refused(t testing.TB, err error, says ...string) {
	t.Helper()
	require.Error(t, err)
	require.Equal(t, fault.ModelLoad, fault.As(err).Code)
	require.NotEmpty(t, fault.As(err).Hint+fmt.Sprint(fault.As(err).Cause))
	for _, s := range says {
		require.ErrorContains(t, err, s)
	}
}

func TestShardsOpenAsOne(t *testing.T) {
	c := open(t, sharded(t))
	require.Equal(t, []string{"a", "b", "c"}, c.Names())
	require.EqualValues(t, 32, c.Bytes())
	info, ok := c.Info("b")
	require.True(t, ok)
	require.Equal(t, "float32", info.DType)
	require.Equal(t, []int64{3}, info.Shape)
	for name, want := range map[string][]float32{"a": {1, 2, 3, 4}, "b": {10, 11, 12}, "c": {20}} {
		x := tensor(t, c, name)
		require.Equal(t, want, floats(t, x))
		x.Free()
	}
	_, err := c.Tensor("d")
	require.ErrorContains(t, err, `no tensor "d"`)
}

func TestAMappingLivesAsLongAsItsTensors(t *testing.T) {
	dir := sharded(t)
	first, second := filepath.Join(dir, "model-00001-of-00002.safetensors"), filepath.Join(dir, "model-00002-of-00002.safetensors")
	c := open(t, dir)
	require.Zero(t, mapped(t, dir), "opening maps nothing")
	b, also, last := tensor(t, c, "b"), tensor(t, c, "b"), tensor(t, c, "c")
	require.Equal(t, b.DataPointer(), also.DataPointer(), "no copy is made")
	require.Equal(t, 1, mapped(t, second), "one mapping a file")
	require.Zero(t, mapped(t, first))
	view, err := last.Share()
	require.NoError(t, err)
	b.Free()
	last.Free()
	c.Close()
	also.Free()
	require.Equal(t, 1, mapped(t, second))
	require.Equal(t, []float32{20}, floats(t, view), "a tensor outlives the checkpoint")
	view.Free()
	require.Zero(t, mapped(t, second), "the last tensor unmaps its file")
	_, err = c.Tensor("a")
	require.Equal(t, fault.Handle, fault.As(err).Code)
}

func TestWritesStayInTheProcess(t *testing.T) {
	content := image(t, 0, source{"w", []int64{4}, 1})
	dir := single(t, content)
	require.NoError(t, os.Chmod(filepath.Join(dir, singleFile), 0o444))
	c := open(t, dir)
	x, y := tensor(t, c, "w"), tensor(t, c, "w")
	zero, err := aten.FromFloat32s([]float32{0}, 1)
	require.NoError(t, err)
	require.NoError(t, aten.CopyInto(x, zero))
	zero.Free()
	require.Equal(t, []float32{0, 0, 0, 0}, floats(t, y))
	x.Free()
	y.Free()
	x = tensor(t, c, "w")
	require.Equal(t, []float32{1, 2, 3, 4}, floats(t, x), "a new mapping reads the file")
	x.Free()
	now, err := os.ReadFile(filepath.Join(dir, singleFile))
	require.NoError(t, err)
	require.Equal(t, content, now)
}

// Memory that is given back holds the same when it is read again, and its neighbours keep what was written
// to them.
func TestMemoryIsGivenBack(t *testing.T) {
	const n = 3 << 19 // elements: 6 MiB
	dir := single(t, image(t, 0, source{"a", []int64{n + 7}, 1}, source{"b", []int64{n}, 10}, source{"c", []int64{n}, 20}))
	resident := func() (kilobytes int64) {
		text, err := os.ReadFile("/proc/self/smaps")
		require.NoError(t, err)
		_, after, found := strings.Cut(string(text), filepath.Join(dir, singleFile)+"\n")
		require.True(t, found)
		_, after, _ = strings.Cut(after, "Rss:")
		_, err = fmt.Sscan(after, &kilobytes)
		require.NoError(t, err)
		return kilobytes
	}
	c := open(t, dir)
	var want [][]float32
	tensors := []aten.Tensor{tensor(t, c, "a"), tensor(t, c, "b"), tensor(t, c, "c")}
	number, err := aten.FromFloat32s([]float32{7}, 1)
	require.NoError(t, err)
	defer number.Free()
	require.NoError(t, aten.CopyInto(tensors[0], number))
	require.NoError(t, aten.CopyInto(tensors[2], number))
	for _, x := range tensors {
		defer x.Free()
		want = append(want, floats(t, x))
	}
	before := resident()
	c.GiveBack(tensors[1])
	require.Less(t, resident(), before-4<<10)
	for i, x := range tensors {
		require.Equal(t, want[i], floats(t, x))
	}
	other, err := aten.Clone(tensors[1])
	require.NoError(t, err)
	defer other.Free()
	c.GiveBack(other)
	require.Equal(t, want[1], floats(t, other), "no mapped file holds it")
}

func TestMisalignedDataIsCopied(t *testing.T) {
	for shift := 1; shift < 4; shift++ {
		dir := single(t, image(t, shift, source{"w", []int64{3, 2}, 1}, source{"s", []int64{}, 7}))
		c := open(t, dir)
		w, s := tensor(t, c, "w"), tensor(t, c, "s")
		require.Zero(t, mapped(t, dir))
		require.Equal(t, "float32", w.DType())
		require.Equal(t, []int64{3, 2}, w.Shape())
		require.Equal(t, []float32{1, 2, 3, 4, 5, 6}, floats(t, w))
		require.Empty(t, s.Shape())
		require.Equal(t, []float32{7}, floats(t, s))
		require.Zero(t, uintptr(w.DataPointer())%4)
		w.Free()
		s.Free()
	}
}

func TestEveryDType(t *testing.T) {
	for stored, c := range map[string]struct {
		name  string
		width int
	}{
		"F64": {"float64", 8}, "F32": {"float32", 4}, "F16": {"float16", 2}, "BF16": {"bfloat16", 2}, "I64": {"int64", 8},
		"I32": {"int32", 4}, "I16": {"int16", 2}, "I8": {"int8", 1}, "U8": {"uint8", 1}, "BOOL": {"bool", 1},
		"F8_E5M2": {"float8_e5m2", 1}, "F8_E4M3": {"float8_e4m3fn", 1}, "C64": {"complex64", 8},
	} {
		for _, shift := range []int{0, 1} { // aligned and not
			text := fmt.Sprintf(`{"w": {"dtype": %q, "shape": [3], "data_offsets": [0, %d]}}`, stored, 3*c.width)
			text += strings.Repeat(" ", 8-len(text)%8+shift)
			file := append(binary.LittleEndian.AppendUint64(nil, uint64(len(text))), text...)
			x := tensor(t, open(t, single(t, append(file, make([]byte, 3*c.width)...))), "w")
			require.Equal(t, c.name, x.DType())
			require.Equal(t, []int64{3}, x.Shape())
			x.Free()
		}
	}
}

func TestEmptyTensorsNeedNoMapping(t *testing.T) {
	dir := single(t, image(t, 0, source{"none", []int64{0, 3}, 0}))
	x := tensor(t, open(t, dir), "none")
	defer x.Free()
	require.Equal(t, []int64{0, 3}, x.Shape())
	require.Zero(t, mapped(t, dir))
}

func TestTensorsFromManyThreads(t *testing.T) {
	dir := sharded(t)
	c := open(t, dir)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				x, err := c.Tensor("b")
				if err != nil || x.Numel() != 3 {
					t.Errorf("%v %d", err, x.Numel())
				}
				x.Free()
			}
		})
	}
	wg.Wait()
	require.Zero(t, mapped(t, dir))
}

func TestOpeningReadsNoData(t *testing.T) {
	// two gigabytes that take no room on the disk: reading them would take seconds
	const count = 1 << 29
	dir := t.TempDir()
	text := fmt.Sprintf(`{"w": {"dtype": "F32", "shape": [%d], "data_offsets": [0, %d]}}`, count, 4*count)
	text += strings.Repeat(" ", 8-len(text)%8)
	path := filepath.Join(dir, singleFile)
	write(t, path, append(binary.LittleEndian.AppendUint64(nil, uint64(len(text))), text...))
	require.NoError(t, os.Truncate(path, int64(8+len(text)+4*count)))
	start := time.Now()
	c := open(t, dir)
	x := tensor(t, c, "w")
	require.Less(t, time.Since(start), 200*time.Millisecond)
	require.EqualValues(t, count, x.Numel())
	x.Free()
}

func TestAChangedFileIsNotMapped(t *testing.T) {
	dir := single(t, image(t, 0, source{"w", []int64{4}, 1}))
	c := open(t, dir)
	path := filepath.Join(dir, singleFile)
	require.NoError(t, os.Truncate(path, 20)) // mapping it would end the process at the first touch
	_, err := c.Tensor("w")
	refused(t, err, path, "has changed")
	require.NoError(t, os.Remove(path))
	_, err = c.Tensor("w")
	refused(t, err, path, "cannot be read any more")
}

func TestSameData(t *testing.T) {
	c := open(t, single(t, image(t, 0, source{"a", []int64{4}, 1}, source{"b", []int64{4}, 1}, source{"c", []int64{4}, 2},
		source{"flat", []int64{2, 2}, 1})))
	for other, want := range map[string]bool{"b": true, "c": false, "flat": false} {
		same, err := c.SameData("a", other)
		require.NoError(t, err)
		require.Equal(t, want, same, other)
	}
	_, err := c.SameData("gone", "missing")
	require.Error(t, err)
}

func TestUnsoundDirectoriesAreRefused(t *testing.T) {
	sound := image(t, 0, source{"w", []int64{4}, 1})
	for name, c := range map[string]struct {
		files map[string]string
		says  []string
	}{
		"empty":     {nil, []string{"holds no safetensors weights", "This one holds nothing"}},
		"no weight": {map[string]string{"config.json": "{}", "README.md": ""}, []string{"This one holds README.md, config.json"}},
		"pickle": {map[string]string{"pytorch_model.bin": "x", "training_args.bin": "x"},
			[]string{"It holds pytorch_model.bin, a pickle", "save_pretrained"}},
		"sharded pickle": {map[string]string{"pytorch_model-00001-of-00002.bin": "x"}, []string{"pytorch_model-00001-of-00002.bin, a pickle"}},
		"gguf":           {map[string]string{"model.gguf": "x"}, []string{"GGUF"}},
		"other name":     {map[string]string{"weights.safetensors": "x"}, []string{"weights.safetensors stands there", "rename it"}},
		"cut short":      {map[string]string{singleFile: string(sound[:len(sound)-1])}, []string{singleFile, "claims bytes [0 16] of the 15", "download it again"}},
		"empty file":     {map[string]string{singleFile: ""}, []string{"too few for a header"}},
		"LFS pointer":    {map[string]string{singleFile: "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"}, []string{"Git LFS pointer", "git lfs pull"}},
		"HTML":           {map[string]string{singleFile: "<!DOCTYPE html><html>not found</html>"}, []string{"is not a sound safetensors file"}},
		"index of junk":  {map[string]string{indexFile: "{\n  \"weight_map\": {\n    oops\n"}, []string{indexFile + " is not JSON: line 3, column 5"}},
		"empty index":    {map[string]string{indexFile: `{"weight_map": {}}`}, []string{"names no tensors"}},
		"index is list":  {map[string]string{indexFile: `[]`}, []string{"holds a JSON array instead of an object"}},
		"index of numbers": {map[string]string{indexFile: `{"weight_map": {"w": 1}}`},
			[]string{"weight_map cannot be a JSON number"}},
		"shard missing": {map[string]string{indexFile: `{"weight_map": {"w": "model-1.safetensors"}}`},
			[]string{"model-1.safetensors is missing", "beside the index"}},
		"climbs out": {map[string]string{indexFile: `{"weight_map": {"w": "../secret.safetensors"}}`},
			[]string{`tensor "w" into "../secret.safetensors"`, "same directory"}},
		"absolute": {map[string]string{indexFile: `{"weight_map": {"w": "/etc/x.safetensors"}}`}, []string{"same directory"}},
		"below":    {map[string]string{indexFile: `{"weight_map": {"w": "sub/x.safetensors"}}`}, []string{"same directory"}},
		"NUL":      {map[string]string{indexFile: `{"weight_map": {"w": "x\u0000.safetensors"}}`}, []string{"same directory"}},
		"not safetensors": {map[string]string{indexFile: `{"weight_map": {"w": "config.json"}}`, "config.json": "{}"},
			[]string{"not a safetensors file"}},
		"index lies": {map[string]string{indexFile: `{"weight_map": {"w": "m.safetensors", "v": "m.safetensors"}}`, "m.safetensors": string(sound)},
			[]string{`m.safetensors holds no tensor "v"`, "do not belong together"}},
		"tensor in two shards": {map[string]string{indexFile: `{"weight_map": {"w": "1.safetensors", "v": "2.safetensors"}}`,
			"1.safetensors": string(sound), "2.safetensors": string(sound)}, []string{`"w" stands in`, "1.safetensors and in", "2.safetensors"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for file, content := range c.files {
				write(t, filepath.Join(dir, file), []byte(content))
			}
			_, err := Open(dir)
			refused(t, err, append(c.says, dir)...)
		})
	}
}

func TestOddFilesAreRefused(t *testing.T) {
	dir := t.TempDir()
	_, err := Open(filepath.Join(dir, "gone"))
	refused(t, err, "there is no directory")
	write(t, filepath.Join(dir, "file"), nil)
	_, err = Open(filepath.Join(dir, "file"))
	refused(t, err, "is a file, not a model's directory")

	require.NoError(t, os.Mkdir(filepath.Join(dir, singleFile), 0o755))
	_, err = Open(dir)
	refused(t, err, singleFile, "not a regular file")

	pipe := t.TempDir()
	require.NoError(t, syscall.Mkfifo(filepath.Join(pipe, singleFile), 0o644))
	_, err = Open(pipe) // must not wait for a writer
	refused(t, err, singleFile, "not a regular file")

	broken := t.TempDir()
	require.NoError(t, os.Symlink("../blobs/gone", filepath.Join(broken, singleFile)))
	_, err = Open(broken)
	refused(t, err, "is a link to ../blobs/gone, which does not exist")
}
