#include "json.h"

#include <stdlib.h>
#include <string.h>

#include "common.h"

/* Deeper than any checkpoint's file, and shallow enough for the stack. */
#define DEEPEST 64

typedef struct reader {
  const char* source;
  const char *at, *end;
  int depth;
} reader;

static json read_value(reader* r);

static noreturn void bad(const reader* r, const char* what) {
  die("%s: is not JSON: %s, %zu bytes before its end", r->source, what, (size_t)(r->end - r->at));
}

static char peek(reader* r) {
  while (r->at < r->end && strchr(" \t\r\n", *r->at) != NULL && *r->at != '\0') ++r->at;
  return r->at < r->end ? *r->at : '\0';
}

static void expect(reader* r, char c) {
  if (peek(r) != c) bad(r, "another character was expected");
  ++r->at;
}

static void* grown(void* memory, size_t count, size_t each) {
  /* Doubled whenever the count is a power of two. */
  if ((count & (count - 1)) != 0) return memory;
  void* larger = realloc(memory, (count > 0 ? 2 * count : 1) * each);
  if (larger == NULL) die("no memory");
  return larger;
}

static unsigned hex4(reader* r) {
  unsigned code = 0;
  for (int i = 0; i < 4; ++i, ++r->at) {
    const char* digits = "0123456789abcdef";
    if (r->at >= r->end) bad(r, "a string ends too early");
    const char c = *r->at >= 'A' && *r->at <= 'F' ? (char)(*r->at + 32) : *r->at;
    const char* digit = c != '\0' ? strchr(digits, c) : NULL;
    if (digit == NULL) bad(r, "four hexadecimal digits were expected");
    code = 16 * code + (unsigned)(digit - digits);
  }
  return code;
}

static char* put_utf8(char* to, unsigned code) {
  if (code < 0x80) {
    *to++ = (char)code;
  } else if (code < 0x800) {
    *to++ = (char)(0xc0 | code >> 6);
    *to++ = (char)(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    *to++ = (char)(0xe0 | code >> 12);
    *to++ = (char)(0x80 | (code >> 6 & 0x3f));
    *to++ = (char)(0x80 | (code & 0x3f));
  } else {
    *to++ = (char)(0xf0 | code >> 18);
    *to++ = (char)(0x80 | (code >> 12 & 0x3f));
    *to++ = (char)(0x80 | (code >> 6 & 0x3f));
    *to++ = (char)(0x80 | (code & 0x3f));
  }
  return to;
}

static char* read_escape(reader* r, char* to) {
  static const char from[] = "\"\\/bfnrt", into[] = "\"\\/\b\f\n\r\t";
  if (r->at >= r->end) bad(r, "a string ends too early");
  const char c = *r->at++;
  const char* known = c != '\0' ? strchr(from, c) : NULL;
  if (known != NULL) {
    *to++ = into[known - from];
    return to;
  }
  if (c != 'u') bad(r, "unknown escape");
  unsigned code = hex4(r);
  if (code >= 0xd800 && code < 0xdc00 && r->end - r->at >= 6 && r->at[0] == '\\' &&
      r->at[1] == 'u') {
    r->at += 2;
    code = 0x10000 + ((code - 0xd800) << 10) + (hex4(r) - 0xdc00);
  }
  return put_utf8(to, code & 0x1fffff);
}

static char* read_string(reader* r) {
  expect(r, '"');
  /* What an escape stands for is never longer than the escape. */
  const char* end = r->at;
  while (end < r->end && *end != '"') end += *end == '\\' ? 2 : 1;
  if (end >= r->end) bad(r, "a string does not end");
  char* text = malloc((size_t)(end - r->at) + 1);
  if (text == NULL) die("no memory");
  char* to = text;
  while (r->at < end) {
    const char c = *r->at++;
    if (c == '\\')
      to = read_escape(r, to);
    else
      *to++ = c;
  }
  *to = '\0';
  r->at = end + 1;
  return text;
}

static json read_entries(reader* r, json_kind kind, char close) {
  json value = {.kind = kind};
  ++r->at;
  if (++r->depth > DEEPEST) bad(r, "it is nested too deeply");
  while (peek(r) != close) {
    if (value.count > 0) expect(r, ',');
    if (kind == JSON_OBJECT) {
      value.keys = grown(value.keys, value.count, sizeof *value.keys);
      peek(r);
      value.keys[value.count] = read_string(r);
      expect(r, ':');
    }
    value.entries = grown(value.entries, value.count, sizeof *value.entries);
    value.entries[value.count] = read_value(r);
    ++value.count;
  }
  ++r->at;
  --r->depth;
  return value;
}

static json read_word(reader* r) {
  static const struct {
    const char* word;
    json value;
  } words[] = {{"true", {.kind = JSON_BOOL, .number = 1}},
               {"false", {.kind = JSON_BOOL}},
               {"null", {.kind = JSON_NULL}}};
  for (size_t i = 0; i < sizeof words / sizeof *words; ++i) {
    const size_t length = strlen(words[i].word);
    if ((size_t)(r->end - r->at) < length || memcmp(r->at, words[i].word, length) != 0) continue;
    r->at += length;
    return words[i].value;
  }
  /* The text is followed by a zero byte, so a number at its end does not run on. */
  char* end;
  const json value = {.kind = JSON_NUMBER, .number = strtod(r->at, &end)};
  if (end == r->at || end > r->end) bad(r, "a value was expected");
  r->at = end;
  return value;
}

static json read_value(reader* r) {
  switch (peek(r)) {
    case '{':
      return read_entries(r, JSON_OBJECT, '}');
    case '[':
      return read_entries(r, JSON_ARRAY, ']');
    case '"':
      return (json){.kind = JSON_STRING, .text = read_string(r)};
    default:
      return read_word(r);
  }
}

json json_parse(const char* source, const char* text, size_t bytes) {
  reader r = {source, text, text + bytes, 0};
  const json value = read_value(&r);
  if (peek(&r) != '\0') bad(&r, "something follows");
  return value;
}

void json_free(json* value) {
  for (size_t i = 0; i < value->count; ++i) {
    json_free(&value->entries[i]);
    if (value->keys != NULL) free(value->keys[i]);
  }
  free(value->keys);
  free(value->entries);
  free(value->text);
}

const json* json_find(const json* object, const char* key) {
  if (object == NULL || object->kind != JSON_OBJECT) return NULL;
  for (size_t i = 0; i < object->count; ++i)
    if (strcmp(object->keys[i], key) == 0)
      return object->entries[i].kind == JSON_NULL ? NULL : &object->entries[i];
  return NULL;
}

const json* json_get(const json* object, const char* key) {
  const json* value = json_find(object, key);
  if (value == NULL) die("the checkpoint's JSON has no \"%s\"", key);
  return value;
}

double json_number(const json* object, const char* key) {
  const json* value = json_get(object, key);
  if (value->kind != JSON_NUMBER) die("\"%s\" is not a number", key);
  return value->number;
}

double json_number_or(const json* object, const char* key, double otherwise) {
  return json_find(object, key) != NULL ? json_number(object, key) : otherwise;
}

const char* json_string(const json* object, const char* key) {
  const json* value = json_get(object, key);
  if (value->kind != JSON_STRING) die("\"%s\" is not a string", key);
  return value->text;
}
