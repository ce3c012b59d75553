/* aten.h: what the Go engine asks of libtorch, as plain C (library nng_aten; links libtorch only).
 *
 * Every function that can fail returns 0 or -1 and on failure stores a malloc'd UTF-8 message in
 * *err (freed with nnga_free); no C++ exception crosses. Tensors are at::Tensor* made with new:
 * [new] is owned by the caller, [borrowed] is only read. All calls act on the calling thread, with
 * its thread-local torch state.
 */
#ifndef NNG_ATEN_H
#define NNG_ATEN_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A value, or the head of a container: containers are flattened, head first, elements after it. */
typedef struct {
  int32_t tag; /* one of the NNGA_ tags */
  int32_t aux; /* slice: which of start, stop, step are given (bits 0, 1, 2) */
  int64_t i;   /* int, bool, dtype (c10::ScalarType), layout, memory format; length of a container,
                  of a string (bytes); slice: none */
  double d;    /* float; complex: real part */
  double e;    /* complex: imaginary part */
  intptr_t p;  /* tensor: its at::Tensor*; string and device: argument, offset into the strings buffer;
                  result, address of the text. An integer, so that Go may keep it in its own memory */
} nnga_val;

enum {
  NNGA_NONE = 0,
  NNGA_BOOL = 1,
  NNGA_INT = 2,
  NNGA_FLOAT = 3,
  NNGA_STRING = 4,
  NNGA_TENSOR = 5,
  NNGA_LIST = 6,  /* i elements follow */
  NNGA_TUPLE = 7, /* i elements follow */
  NNGA_DICT = 8,  /* i pairs follow, key then value (results only; no operator gives one yet) */
  NNGA_SLICE = 9, /* three elements follow: start, stop, step (int or none; tensors of one int allowed) */
  NNGA_ELLIPSIS = 10,
  NNGA_DTYPE = 11,
  NNGA_DEVICE = 12,
  NNGA_LAYOUT = 13,
  NNGA_MEMORY_FORMAT = 14,
  NNGA_COMPLEX = 15
};

void nnga_free(void* p);

/* Handles alive now that were made here or counted with nnga_count (+1/-1 for handles of others). */
int64_t nnga_live(void);
void nnga_count(int64_t delta);

void nnga_tensor_free(void* t);
void* nnga_tensor_clone_handle(void* t); /* another handle on the same TensorImpl [new]; null: no memory */

/* Facts about a tensor [borrowed]. sizes and strides take up to *ndim entries (in: room, out: how
 * many); facts: {scalar type, device type, device index, element size, storage offset, requires_grad,
 * numel, version, storage data pointer, data pointer, use count of the impl, storage bytes}. */
enum { NNGA_FACTS = 12 };
int nnga_tensor_facts(void* t, int64_t* facts, int64_t* sizes, int64_t* strides, int64_t* ndim, char** err);

/* A tensor over memory that is not ours [new]: free_fn(ctx) is called once, when its storage dies, on
 * whatever thread that happens (never, if free_fn is null, if this call fails, or in a forked child). */
int nnga_from_blob(void* data, const int64_t* sizes, int64_t ndim, int64_t scalar_type, void (*free_fn)(uintptr_t),
                   uintptr_t ctx, void** out, char** err);

/* Finds an operator. overload null: any overload (chosen at each call by the arguments, the way
 * PyTorch's Python argument parser does); "": the default one. [new: a handle that lives as long as
 * the process, for any thread] */
int nnga_op_find(const char* name, const char* overload, void** op, char** err);

/* The schemas of an operator's overloads, one a line. */
int nnga_op_schemas(const char* name, char** out, char** err);

/* The arguments that it may write to, of all its overloads: a place, -1 where it has only a name, and the
 * name, one a line. */
int nnga_op_writes(void* op, char** out, char** err);

/* Calls it. args: nargs positional values then nkw keyword values, flattened, in order; kwnames:
 * nkw names, each ended by a NUL, one after another. Arguments are converted to what the schema says
 * (an int becomes a float, a Scalar, a one-element list where int[1] is wanted; a number becomes a
 * wrapped tensor where only a tensor fits) and missing ones take their defaults.
 * The result goes to *out: a tensor [new], a plain value, or NNGA_NONE where there is none. A
 * container, a string or several results (one tuple) go to *outs instead, *nouts flattened values in
 * a malloc'd array freed with nnga_free, whose tensors are [new]; otherwise *nouts is 0. */
int nnga_op_call(void* op, const nnga_val* args, int64_t nargs, int64_t nkw, const char* kwnames, const char* strings,
                 nnga_val* out, nnga_val** outs, int64_t* nouts, char** err);

/* self[index] and self[index] = value with Python's rules (ints, slices, None, Ellipsis, bools, bool
 * and integer tensors, nested int lists, tuples of these). value: a tensor or a number. */
int nnga_index_get(void* self, const nnga_val* index, void** out, char** err);
int nnga_index_set(void* self, const nnga_val* index, const nnga_val* value, char** err);

/* Gives torch the number of threads that it had when this library was loaded. */
void nnga_keep_threads(void);

/* The state of a device's random number generator [new], and its return [borrowed]. */
int nnga_random_state(const char* device, void** out, char** err);
int nnga_set_random_state(const char* device, void* state, char** err);

/* The thread's autograd switches. */
int32_t nnga_grad_enabled(void);
void nnga_set_grad_enabled(int32_t on);
int32_t nnga_inference_enabled(void);

/* An inference-mode guard [new], and its end. */
void* nnga_inference_enter(int32_t on);
void nnga_inference_leave(void* guard);

/* The value that takes a tensor's place so that autograd follows it from here on [new]: of the same
 * memory, or the tensor itself where autograd follows it already. retain: backward passes fill its .grad. */
int nnga_track(void* t, int32_t retain, void** out, char** err);

/* When autograd met the operation that gave a tensor: what came later has the larger number. -1: none gave it. */
int64_t nnga_grad_order(void* t);

/* Tensors [borrowed]; null stands for none. */
typedef struct {
  void* const* p;
  int64_t n;
} nnga_tensors;

enum {
  NNGA_RETAIN = 1, /* the graph can be gone through again */
  NNGA_CREATE = 2, /* gradients have a history of their own */
  NNGA_FILL = 4,   /* fill the .grad of leaves, and of tensors that retain it */
};

/* A backward pass. given are six lists: the tensors it starts from, their gradients (as many, or
 * none: ones), the tensors whose gradients are asked for, those that retain theirs, those whose
 * gradients are replaced on the way, and by what. grads has room for the gradients that are asked for [new]; null where
 * the pass does not come to the tensor. */
int nnga_backward(const nnga_tensors* given, int32_t flags, void** grads, char** err);

/* Whether what a device does can be captured, and done again: a CUDA graph. */
int32_t nnga_can_capture(const char* device);

/* The settings of torch that a captured pass keeps to; -1 where nothing is to be captured or replayed now. */
int64_t nnga_capture_settings(const char* device);

/* Begins to capture what this thread gives the device [new handle]: nothing is computed until the replay. What needs a
 * value meanwhile, or copies from the CPU, fails. nnga_capture_end ends it, and must be called on the same thread
 * whatever has happened; where it fails there is nothing to replay. One at a time. */
int nnga_capture_begin(const char* device, void** capture, char** err);
int nnga_capture_end(void* capture, char** err);

/* Whether this thread gives its work to the stream that the capture belongs to, and so may replay it. */
int32_t nnga_capture_here(void* capture);

/* Does it again, with the same memory. */
int nnga_capture_replay(void* capture, char** err);
void nnga_capture_free(void* capture);

/* Whether a tensor [borrowed] is no more than elements in a storage. */
int32_t nnga_is_plain(void* t);

/* Whether tensors are where others were [borrowed], with the same meaning, and autograd follows none. */
int32_t nnga_unmoved(void* const* tensors, void* const* others, int64_t n);

/* "float32" <-> c10::ScalarType number; -1 and null where there is none. */
int64_t nnga_dtype(const char* name);
const char* nnga_dtype_name(int64_t scalar_type);

/* c10::DeviceType number -> "cpu" [a malloc'd text, freed with nnga_free]; null: no memory. */
char* nnga_device_name(int64_t device_type);

/* Counts the memory of the process's CPU tensors from the first call on, and allows so many bytes more than
 * there are (negative: any number). What would take more fails. */
int nnga_cap_memory(int64_t more, char** err);

/* The bytes of tensors made since then, now and at most since the last cap. */
int64_t nnga_allocated(void);
int64_t nnga_peak_allocated(void);

int32_t nnga_cuda_available(void);
const char* nnga_torch_version(void);

#ifdef __cplusplus
}
#endif
#endif
