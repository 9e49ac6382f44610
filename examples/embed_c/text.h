/* From text to token ids and back, for the bundled checkpoints: their tokenizer has a token for
 * every printable ASCII character, for the newline and for the names of the roles. */
#ifndef EMBED_TEXT_H_
#define EMBED_TEXT_H_

#include <stddef.h>
#include <stdint.h>

#include "json.h"

json tokenizer_open(const char* folder);

/* The ids of one user turn, up to where the model's answer begins; at most `most`. Returns how
 * many. */
int64_t encode_turn(const json* tokenizer, const char* text, int32_t* ids, int64_t most);

/* An id's text; "" for a special token's. */
const char* text_of(const json* tokenizer, int32_t id);

#endif
