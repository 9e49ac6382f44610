#include "text.h"

#include <stdlib.h>
#include <string.h>

#include "common.h"

json tokenizer_open(const char* folder) {
  size_t bytes;
  char* text = read_file(folder, "tokenizer.json", &bytes);
  const json value = json_parse("tokenizer.json", text, bytes);
  free(text);
  return value;
}

static const json* vocabulary_of(const json* tokenizer) {
  return json_get(json_get(tokenizer, "model"), "vocab");
}

int64_t encode_turn(const json* tokenizer, const char* text, int32_t* ids, int64_t most) {
  const json* vocabulary = vocabulary_of(tokenizer);
  const char* before[] = {"<bos>", "<|turn>", "user", "\n"};
  const char* after[] = {"<turn|>", "\n", "<|turn>", "model", "\n"};
  const int64_t length = (int64_t)strlen(text);
  int64_t count = 0;
  if (length + 9 > most)
    die("the text has %lld characters, wants at most %lld", (long long)length,
        (long long)(most - 9));
  for (size_t i = 0; i < 4; ++i) ids[count++] = (int32_t)json_number(vocabulary, before[i]);
  for (int64_t i = 0; i < length; ++i) {
    const char one[2] = {text[i], '\0'};
    if (json_find(vocabulary, one) == NULL)
      die("the text's byte %lld is no character of the tokenizer's", (long long)i);
    ids[count++] = (int32_t)json_number(vocabulary, one);
  }
  for (size_t i = 0; i < 5; ++i) ids[count++] = (int32_t)json_number(vocabulary, after[i]);
  return count;
}

const char* text_of(const json* tokenizer, int32_t id) {
  const json* added = json_find(tokenizer, "added_tokens");
  for (size_t i = 0; added != NULL && i < added->count; ++i)
    if ((int32_t)json_number(&added->entries[i], "id") == id) return "";
  const json* vocabulary = vocabulary_of(tokenizer);
  for (size_t i = 0; i < vocabulary->count; ++i)
    if ((int32_t)vocabulary->entries[i].number == id) return vocabulary->keys[i];
  return "";
}
