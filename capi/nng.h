/* nng.h: the C ABI of the nnsight-go engine. This header is its manual.
 *
 * Results. Every function that can fail returns a code: 0 is success, anything else a failure.
 * On failure a UTF-8 JSON object describing the fault is put into *err (see below) and every
 * other out-parameter is left as it was. There is no hidden "last error".
 *
 * Buffers. An nng_buf given to the caller is owned by the caller, who frees it with nng_free.
 * Memory passed in (strings, graphs, arrays) is read during the call only and stays the caller's.
 *
 * Handles. Models, runs, generations, tokenizers and streams are generation-checked integers, never
 * pointers; 0 is never valid. A stale or foreign handle is a failure with code NNG_EHANDLE, never a crash.
 *
 * Tensors. A void* tensor is a pointer to an at::Tensor made with new. [new] means the caller now
 * owns it and frees it with nngpy_tensor_free (Python) or nng_tensor_free; [borrowed] means it is
 * read during the call and stays the caller's.
 *
 * Threads. Any thread may call any function; a run belongs to one call at a time (a second gets
 * NNG_EBUSY). Work is done on the calling thread, with that thread's torch state. None of the
 * functions needs or takes Python's global lock, and the engine never calls Python.
 *
 * Forks. In a child made by fork every function fails with NNG_EFORK, but nng_free, which works, and
 * nng_tensor_free and nng_tensors_free, which do nothing there.
 *
 * Null. A null pointer where something is needed, or a negative size, is a failure with code
 * NNG_EFAULT; err itself may be null where nobody wants to know why.
 *
 * Fault JSON: {"code": "OpError", "message": "...", "hint": "...", "path": "transformer.h.5",
 * "op": "aten::mm", "node": 3, "invoke": 0, "step": -1, "file": "x.py", "line": 7, "func": "f",
 * "other_file": "", "other_line": 0, "cause": "..."}; unknown fields are left out.
 */
#ifndef NNG_H
#define NNG_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  NNG_OK = 0,
  NNG_EFAULT = 1,  /* the work failed: *err says why */
  NNG_EHANDLE = 2, /* stale or unknown handle */
  NNG_EFORK = 3,   /* called in a forked child */
  NNG_EBUSY = 4,   /* the run is in use by another thread */
  NNG_EPANIC = 5   /* a bug in the engine; *err holds the stack */
};

typedef struct {
  uint8_t* data;
  int64_t size;
} nng_buf;

typedef uint64_t nng_model;
typedef uint64_t nng_run;
typedef uint64_t nng_tokenizer;
typedef uint64_t nng_generation;
typedef uint64_t nng_stream;

/* Frees a buffer's memory and zeroes it. Null and empty buffers are fine. */
void nng_free(nng_buf* buf);

/* The version of this ABI (wire form included) and of the library, as JSON:
 * {"abi": 2, "version": "0.1.0", "torch": "2.15", "go": "go1.26", "architectures": ["GPT2LMHeadModel", ...],
 * "cuda": bool (torch sees a GPU)}. */
int nng_version(nng_buf* out, nng_buf* err);

/* Counters for tests, as JSON: {"tensors": n, "handles": n, "captures": n}: tensors the engine holds now
 * (parameters included), open handles, and passes that were captured on a GPU. */
int nng_counters(nng_buf* out, nng_buf* err);

/* ---- models ---- */

/* Opens a model directory: reads the config and the headers of its weights, not the weights.
 * options is JSON: {"dtype": "float32" | "float16" | "bfloat16" | null (as stored),
 * "device": "cpu" | "cuda:0", "load": bool (map the weights now), "bare": bool (there need be no weights: the
 * model is described, and never runs), "prepack": int (bytes of packed weights that
 * are kept to multiply with; 0: 2 GiB; negative: none), "captures": int (for how many
 * schedules a GPU keeps their pass, to do it again)}. */
int nng_model_open(const char* dir, const char* options, nng_model* out, nng_buf* err);

/* Maps the weights, if they are not yet. */
int nng_model_load(nng_model model, nng_buf* err);

/* Makes a model whose forward pass the caller does, from its access points: a JSON list of {"path", "port",
 * "leaves"} in the order in which a pass comes to them. Runs are all that can be made of it. A step of such
 * a run may end with *done 2: it wants what stands at access point *point of forward pass *forward
 * (nng_run_wanted). nng_run_feed hands its tensors over [borrowed; null for one that is not there]; after the steps
 * that follow, nng_run_given gives the numbers of those that are to be replaced (*out, a JSON list) and by what
 * (*tensors, *n: as nng_run_results). */
int nng_hosted_new(const char* points, nng_model* out, nng_buf* err);
int nng_run_wanted(nng_run run, int32_t* forward, int32_t* point, nng_buf* err);
int nng_run_feed(nng_run run, void* const* tensors, int64_t n, nng_buf* err);
int nng_run_given(nng_run run, nng_buf* out, void*** tensors, int64_t* n, nng_buf* err);

/* Switches dropout on (not 0) or off, for runs that begin from now on. Off in a model that was opened. */
int nng_model_train(nng_model model, int32_t on, nng_buf* err);

/* Has every token of every row computed (not 0), or each distinct one that somebody looks at (0, as in a model that was
 * opened), in runs that begin from now on. The results are the same. */
int nng_model_apart(nng_model model, int32_t on, nng_buf* err);

/* Says what a run of a whole graph with that many constants would compute, as text: its forward passes, the modules
 * that never run, and those that are done for some of the tokens alone. Nothing runs. */
int nng_model_explain(nng_model model, const uint8_t* graph, int64_t size, int64_t nconsts, nng_buf* out, nng_buf* err);

/* Runs a request of the remote protocol (docs/remote-protocol.md), a safetensors file that is not compressed, as a
 * server would; *out is the response. The request is read while the call lasts. */
int nng_model_perform(nng_model model, const uint8_t* request, int64_t size, nng_buf* out, nng_buf* err);

/* Closes the model: no run starts any more. Runs under way go on, and the last of them gives the
 * weights back. Tensors handed out stay valid. */
int nng_model_close(nng_model model, nng_buf* err);

/* Describes the model, as JSON (see docs/architecture.md, "Model description"). Needs no weights. */
int nng_model_describe(nng_model model, nng_buf* out, nng_buf* err);

/* The parameter or buffer of that name [new], sharing storage with the model. */
int nng_model_param(nng_model model, const char* name, void** tensor, nng_buf* err);

/* ---- runs ---- */

/* Starts a run of a recorded graph (the wire form, docs/wire.md). consts are the tensors that
 * KindConst nodes number [borrowed: the run takes references of its own]. With end 0 the graph may go
 * on: what it saves is computed, and nng_run_more adds to it.
 *
 * Any bytes may be given: reading them and holding them to the model is safe. Running is as safe as
 * whoever wrote the graph, since it may call any operator that PyTorch has in this process: some
 * read and write files (aten::from_file), and some end the process when their arguments make no
 * sense (aten::quantized_lstm_cell, many backward functions). */
int nng_run_new(nng_model model, const uint8_t* graph, int64_t size, void* const* consts, int64_t nconsts, int32_t end,
                nng_run* out, nng_buf* err);

/* Adds to the graph of a run that is done and has not come to its end: a graph in wire form whose
 * invokes, nodes and positions are numbered on from those the run has, and the constants that are new.
 * nng_run_step then goes on, and nng_run_results gives the values of the save nodes that were added.
 * A run for which this fails has freed its tensors and can only be freed. */
int nng_run_more(nng_run run, const uint8_t* graph, int64_t size, void* const* consts, int64_t nconsts, int32_t end,
                 nng_buf* err);

/* Works for about budget_ms milliseconds (0: to the end), then returns so that the caller may look at
 * signals. It stops between two operators only. *done becomes 1 when the run has ended, else 0. A failed run has freed
 * its tensors and can only be freed. */
int nng_run_step(nng_run run, int64_t budget_ms, int32_t* done, nng_buf* err);

/* The saved values of a run that is done: *out is MessagePack, a list with one entry a Save node in
 * program order, [node, value], where a value is an argument of the wire form whose references
 * [0, i] number the tensors; tensors[0..*ntensors) are those tensors, each [new], in an array freed
 * with nng_tensors_free. The values move out: a second call gives an empty list. A run that is not
 * done, or that failed, is a failure with code NNG_EHANDLE. */
int nng_run_results(nng_run run, nng_buf* out, void*** tensors, int64_t* ntensors, nng_buf* err);

/* Ends a run, finished or not, and frees everything it still holds. */
int nng_run_free(nng_run run, nng_buf* err);

/* Frees the array that nng_run_results gave, and those of its tensors that are not null: a caller
 * that took a tensor over writes null in its place. */
void nng_tensors_free(void** tensors, int64_t ntensors);

/* Frees one tensor [new]. */
void nng_tensor_free(void* tensor);

/* ---- generations ---- */

/* Begins to generate. prompt is JSON: {"rows": [[ids], ...], "masks": [[0 or 1], ...] or null}; rows of
 * different lengths are padded on the left. settings is JSON, with transformers' names:
 * {"max_new_tokens": 20, "min_new_tokens": 0, "eos_token_id": [..], "pad_token_id": 0, "do_sample": false,
 * "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1, "repetition_penalty": 1,
 * "no_repeat_ngram_size": 0, "num_return_sequences": 1, "num_beams": 1, "length_penalty": 1,
 * "early_stopping": "false", "true" or "never"}. num_return_sequences and num_beams make so many rows of each
 * prompt, side by side. Sampling draws from torch's default generator. */
int nng_generation_new(nng_model model, const char* prompt, const char* settings, nng_generation* out, nng_buf* err);

/* Starts the next step: a run as nng_run_new makes one, whose graph has one invoke without rows, which
 * sees the step's tokens: the prompts at step 0, and then one token a row. */
int nng_generation_step(nng_generation generation, const uint8_t* graph, int64_t size, void* const* consts,
                        int64_t nconsts, int32_t end, nng_run* out, nng_buf* err);

/* Draws the next token of each row, once the step's run is done and its results are taken: *out is JSON,
 * {"tokens": [..], "done": bool}. A row that has ended goes on with pad_token_id. A
 * beam search adds "rows": [[ids], ..], all tokens of its beams, in whose order the next step has them; with
 * "done" they are the sequences that it found, num_return_sequences of each prompt. */
int nng_generation_next(nng_generation generation, nng_buf* out, nng_buf* err);

/* The first half of nng_generation_next, for a caller who changes scores: *tensor [new] is float32
 * [rows, vocab], log probabilities in a beam search, with repetition_penalty, no_repeat_ngram_size and
 * min_new_tokens applied. */
int nng_generation_scores(nng_generation generation, void** tensor, nng_buf* err);

/* The second half: draws from scores [borrowed], a tensor as nng_generation_scores gave it. *filtered
 * [new], unless filtered is null, is what temperature, top_k, top_p, min_p and typical_p left of them;
 * *out is as nng_generation_next gives it. */
int nng_generation_choose(nng_generation generation, void* scores, void** filtered, nng_buf* out, nng_buf* err);

/* Ends the rows r of n with rows[r] not 0, as an eos_token_id just drawn would have. *done tells whether
 * all have ended. Without any eos_token_id, rows that have ended go on until all have. */
int nng_generation_end(nng_generation generation, const int32_t* rows, int64_t n, int32_t* done, nng_buf* err);

/* Ends the generation and gives its memory back; a run of it that goes on fails. */
int nng_generation_free(nng_generation generation, nng_buf* err);

/* Prints a graph in wire form: as text, or (mermaid not 0) as a Mermaid flow chart. Needs no model. */
int nng_graph_text(const uint8_t* graph, int64_t size, int32_t mermaid, nng_buf* out, nng_buf* err);

/* ---- tokenizers ---- */

/* Opens the tokenizer of a model directory: tokenizer.json, with tokenizer_config.json beside it. */
int nng_tokenizer_open(const char* dir, nng_tokenizer* out, nng_buf* err);

int nng_tokenizer_close(nng_tokenizer tokenizer, nng_buf* err);

/* Describes it, as JSON: vocab_size, len, special tokens with ids, padding_side, model_max_length,
 * chat_template, add_bos/eos flags. */
int nng_tokenizer_describe(nng_tokenizer tokenizer, nng_buf* out, nng_buf* err);

/* Encodes text (size bytes of UTF-8, NUL allowed). *out is JSON:
 * {"ids": [..], "tokens": [..], "offsets": [[start, end], ..] in characters,
 * "special_tokens_mask": [..], "type_ids": [..]}. */
int nng_tokenizer_encode(nng_tokenizer tokenizer, const char* text, int64_t size, int32_t add_special_tokens,
                         nng_buf* out, nng_buf* err);

/* Encodes only to ids: *out holds int64 values in the machine's byte order. */
int nng_tokenizer_ids(nng_tokenizer tokenizer, const char* text, int64_t size, int32_t add_special_tokens, nng_buf* out,
                      nng_buf* err);

/* Decodes ids; *out is the text. An id outside the vocabulary is a failure that names it. */
int nng_tokenizer_decode(nng_tokenizer tokenizer, const int64_t* ids, int64_t n, int32_t skip_special_tokens,
                         nng_buf* out, nng_buf* err);

/* *out is JSON: a list of tokens (null where the vocabulary has none). */
int nng_tokenizer_tokens(nng_tokenizer tokenizer, const int64_t* ids, int64_t n, nng_buf* out, nng_buf* err);

/* tokens is a JSON list of strings; *out is a JSON list of ids (null where there is none). */
int nng_tokenizer_lookup(nng_tokenizer tokenizer, const char* tokens, nng_buf* out, nng_buf* err);

/* The whole vocabulary with added tokens, as a JSON object token -> id. */
int nng_tokenizer_vocab(nng_tokenizer tokenizer, nng_buf* out, nng_buf* err);

/* Starts to turn ids that come one at a time into pieces of text; once the tokenizer is closed, its
 * streams fail. */
int nng_stream_new(nng_tokenizer tokenizer, int32_t skip_special_tokens, nng_stream* out, nng_buf* err);

/* Takes the next n ids; *out is the text that became certain, empty inside a character of several
 * bytes. With end not 0 nothing follows: *out has what was held back too. */
int nng_stream_step(nng_stream stream, const int64_t* ids, int64_t n, int32_t end, nng_buf* out, nng_buf* err);

int nng_stream_free(nng_stream stream, nng_buf* err);

#ifdef __cplusplus
}
#endif
#endif
