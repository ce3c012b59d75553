/* shim.c: the exported functions, in C so that a forked child is turned away before it enters the
 * Go runtime (whose threads do not exist there, so that the call would hang). */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "_cgo_export.h"
#include "nng.h"

static volatile int forked;

static void in_child(void) { forked = 1; }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }

static int refuse(nng_buf* err) {
  static const char text[] =
      "{\"code\": \"ForkError\", \"message\": \"the engine cannot be used in a process made by fork\", "
      "\"hint\": \"Start workers with the spawn method (multiprocessing.set_start_method(\\\"spawn\\\")), or import "
      "nnsight_go only in the children.\"}";
  if (err != NULL) {
    err->data = malloc(sizeof text);
    err->size = err->data == NULL ? 0 : (int64_t)(sizeof text - 1);
    if (err->data != NULL) memcpy(err->data, text, sizeof text);
  }
  return NNG_EFORK;
}

void nng_free(nng_buf* buf) {
  if (buf == NULL) return;
  free(buf->data);
  buf->data = NULL;
  buf->size = 0;
}

int nng_version(nng_buf* out, nng_buf* err) { return forked ? refuse(err) : nngo_version(out, err); }

int nng_counters(nng_buf* out, nng_buf* err) { return forked ? refuse(err) : nngo_counters(out, err); }

int nng_model_open(const char* dir, const char* options, nng_model* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_model_open((char*)dir, (char*)options, out, err);
}

int nng_model_load(nng_model model, nng_buf* err) { return forked ? refuse(err) : nngo_model_load(model, err); }

int nng_hosted_new(const char* points, nng_model* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_hosted_new((char*)points, out, err);
}

int nng_run_wanted(nng_run run, int32_t* forward, int32_t* point, nng_buf* err) {
  return forked ? refuse(err) : nngo_run_wanted(run, forward, point, err);
}

int nng_run_feed(nng_run run, void* const* tensors, int64_t n, nng_buf* err) {
  return forked ? refuse(err) : nngo_run_feed(run, (void**)tensors, n, err);
}

int nng_run_given(nng_run run, nng_buf* out, void*** tensors, int64_t* n, nng_buf* err) {
  return forked ? refuse(err) : nngo_run_given(run, out, tensors, n, err);
}

int nng_model_train(nng_model model, int32_t on, nng_buf* err) {
  return forked ? refuse(err) : nngo_model_train(model, on, err);
}

int nng_model_apart(nng_model model, int32_t on, nng_buf* err) {
  return forked ? refuse(err) : nngo_model_apart(model, on, err);
}

int nng_model_explain(nng_model model, const uint8_t* graph, int64_t size, int64_t nconsts, nng_buf* out,
                      nng_buf* err) {
  return forked ? refuse(err) : nngo_model_explain(model, (uint8_t*)graph, size, nconsts, out, err);
}

int nng_model_perform(nng_model model, const uint8_t* request, int64_t size, nng_buf* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_model_perform(model, (uint8_t*)request, size, out, err);
}

int nng_model_close(nng_model model, nng_buf* err) { return forked ? refuse(err) : nngo_model_close(model, err); }

int nng_model_describe(nng_model model, nng_buf* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_model_describe(model, out, err);
}

int nng_model_param(nng_model model, const char* name, void** tensor, nng_buf* err) {
  return forked ? refuse(err) : nngo_model_param(model, (char*)name, tensor, err);
}

int nng_run_new(nng_model model, const uint8_t* graph, int64_t size, void* const* consts, int64_t nconsts, int32_t end,
                nng_run* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_run_new(model, (uint8_t*)graph, size, (void**)consts, nconsts, end, out, err);
}

int nng_run_more(nng_run run, const uint8_t* graph, int64_t size, void* const* consts, int64_t nconsts, int32_t end,
                 nng_buf* err) {
  return forked ? refuse(err) : nngo_run_more(run, (uint8_t*)graph, size, (void**)consts, nconsts, end, err);
}

int nng_run_step(nng_run run, int64_t budget_ms, int32_t* done, nng_buf* err) {
  return forked ? refuse(err) : nngo_run_step(run, budget_ms, done, err);
}

int nng_run_results(nng_run run, nng_buf* out, void*** tensors, int64_t* ntensors, nng_buf* err) {
  return forked ? refuse(err) : nngo_run_results(run, out, tensors, ntensors, err);
}

int nng_run_free(nng_run run, nng_buf* err) { return forked ? refuse(err) : nngo_run_free(run, err); }

int nng_generation_new(nng_model model, const char* prompt, const char* settings, nng_generation* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_generation_new(model, (char*)prompt, (char*)settings, out, err);
}

int nng_generation_step(nng_generation generation, const uint8_t* graph, int64_t size, void* const* consts,
                        int64_t nconsts, int32_t end, nng_run* out, nng_buf* err) {
  return forked ? refuse(err)
                : nngo_generation_step(generation, (uint8_t*)graph, size, (void**)consts, nconsts, end, out, err);
}

int nng_generation_next(nng_generation generation, nng_buf* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_generation_next(generation, out, err);
}

int nng_generation_scores(nng_generation generation, void** tensor, nng_buf* err) {
  return forked ? refuse(err) : nngo_generation_scores(generation, tensor, err);
}

int nng_generation_choose(nng_generation generation, void* scores, void** filtered, nng_buf* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_generation_choose(generation, scores, filtered, out, err);
}

int nng_generation_end(nng_generation generation, const int32_t* rows, int64_t n, int32_t* done, nng_buf* err) {
  return forked ? refuse(err) : nngo_generation_end(generation, (int32_t*)rows, n, done, err);
}

int nng_generation_free(nng_generation generation, nng_buf* err) {
  return forked ? refuse(err) : nngo_generation_free(generation, err);
}

int nng_graph_text(const uint8_t* graph, int64_t size, int32_t mermaid, nng_buf* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_graph_text((uint8_t*)graph, size, mermaid, out, err);
}

void nng_tensors_free(void** tensors, int64_t ntensors) {
  if (!forked) nngo_tensors_free(tensors, ntensors);
}

void nng_tensor_free(void* tensor) {
  if (!forked) nngo_tensor_free(tensor);
}

int nng_tokenizer_open(const char* dir, nng_tokenizer* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_tokenizer_open((char*)dir, out, err);
}

int nng_tokenizer_close(nng_tokenizer tokenizer, nng_buf* err) {
  return forked ? refuse(err) : nngo_tokenizer_close(tokenizer, err);
}

int nng_tokenizer_describe(nng_tokenizer tokenizer, nng_buf* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_tokenizer_describe(tokenizer, out, err);
}

int nng_tokenizer_encode(nng_tokenizer tokenizer, const char* text, int64_t size, int32_t add_special_tokens,
                         nng_buf* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_tokenizer_encode(tokenizer, (char*)text, size, add_special_tokens, out, err);
}

int nng_tokenizer_ids(nng_tokenizer tokenizer, const char* text, int64_t size, int32_t add_special_tokens, nng_buf* out,
                      nng_buf* err) {
  return forked ? refuse(err) : nngo_tokenizer_ids(tokenizer, (char*)text, size, add_special_tokens, out, err);
}

int nng_tokenizer_decode(nng_tokenizer tokenizer, const int64_t* ids, int64_t n, int32_t skip_special_tokens,
                         nng_buf* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_tokenizer_decode(tokenizer, (int64_t*)ids, n, skip_special_tokens, out, err);
}

int nng_tokenizer_tokens(nng_tokenizer tokenizer, const int64_t* ids, int64_t n, nng_buf* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_tokenizer_tokens(tokenizer, (int64_t*)ids, n, out, err);
}

int nng_tokenizer_lookup(nng_tokenizer tokenizer, const char* tokens, nng_buf* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_tokenizer_lookup(tokenizer, (char*)tokens, out, err);
}

int nng_tokenizer_vocab(nng_tokenizer tokenizer, nng_buf* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_tokenizer_vocab(tokenizer, out, err);
}

int nng_stream_new(nng_tokenizer tokenizer, int32_t skip_special_tokens, nng_stream* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_stream_new(tokenizer, skip_special_tokens, out, err);
}

int nng_stream_step(nng_stream stream, const int64_t* ids, int64_t n, int32_t end, nng_buf* out, nng_buf* err) {
  return forked ? refuse(err) : nngo_stream_step(stream, (int64_t*)ids, n, end, out, err);
}

int nng_stream_free(nng_stream stream, nng_buf* err) { return forked ? refuse(err) : nngo_stream_free(stream, err); }
