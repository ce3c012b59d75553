/* nngtok.h: our functions in libtokenizers.a, beside those of daulet/tokenizers.
 *
 * tok is the pointer that tokenizers_from_bytes gave. A call gives 0, or 1 and a UTF-8 message in
 * *err. Bytes in *out and *err are the caller's, who frees them with nngtok_free. Numbers in them
 * are uint32 in the machine's byte order unless said otherwise; "strings" are their lengths in
 * bytes, then their bytes (UTF-8, NUL allowed). What is passed in is only read during the call.
 *
 * Reads of one tokenizer may run at the same time; nngtok_add_tokens and nngtok_post_processor
 * need it to themselves.
 */
#ifndef NNGTOK_H
#define NNGTOK_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
  uint8_t* ptr;
  size_t len;
} nngtok_bytes;

/* Encodes a text, or a pair of texts: n, ids[n], type_ids[n], special_tokens_mask[n],
 * (start, end)[n] in characters of the text, n strings (the tokens). */
int32_t nngtok_encode(void* tok, const uint8_t* first, size_t first_len, const uint8_t* second, size_t second_len,
                      bool pair, bool add_special, nngtok_bytes* out, nngtok_bytes* err);

/* Encodes a text to ids, as int64. */
int32_t nngtok_ids(void* tok, const uint8_t* text, size_t len, bool add_special, nngtok_bytes* out, nngtok_bytes* err);

/* Decodes ids to text. Ids outside the vocabulary are passed over. */
int32_t nngtok_decode(void* tok, const uint32_t* ids, size_t n, bool skip_special, nngtok_bytes* out,
                      nngtok_bytes* err);

/* The tokens of ids, as n strings; the length is UINT32_MAX where there is none. */
int32_t nngtok_tokens(void* tok, const uint32_t* ids, size_t n, nngtok_bytes* out, nngtok_bytes* err);

/* The id of a token in *id, or -1. */
int32_t nngtok_lookup(void* tok, const uint8_t* token, size_t len, int64_t* id, nngtok_bytes* err);

/* The vocabulary with added tokens, by rising id: n, ids[n], n strings. */
int32_t nngtok_vocab(void* tok, nngtok_bytes* out, nngtok_bytes* err);

/* JSON: {"model": "BPE", "vocab_size": without added tokens, "len": with them, "post_processor":
 * whether there is one, "adds": how many special tokens it adds to one text, "added": [{"id",
 * "content", "single_word", "lstrip", "rstrip", "normalized", "special"}, ...] by rising id}. */
int32_t nngtok_describe(void* tok, nngtok_bytes* out, nngtok_bytes* err);

/* Adds tokens: a JSON list like "added" above, without ids. */
int32_t nngtok_add_tokens(void* tok, const uint8_t* json, size_t len, nngtok_bytes* err);

/* Sets the post-processor: JSON as in tokenizer.json. */
int32_t nngtok_post_processor(void* tok, const uint8_t* json, size_t len, nngtok_bytes* err);

/* Frees bytes and zeroes them. Null is fine. */
void nngtok_free(nngtok_bytes* bytes);

/* Panics inside and reports it, for tests. */
int32_t nngtok_test_panic(nngtok_bytes* err);

#endif
