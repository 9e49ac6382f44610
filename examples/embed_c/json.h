/* JSON as a tree of values, as much of it as the files of a checkpoint need. */
#ifndef EMBED_JSON_H_
#define EMBED_JSON_H_

#include <stddef.h>

typedef enum json_kind {
  JSON_NULL,
  JSON_BOOL,
  JSON_NUMBER,
  JSON_STRING,
  JSON_ARRAY,
  JSON_OBJECT
} json_kind;

typedef struct json {
  json_kind kind;
  double number; /* of a number; 0 or 1 of a bool */
  char* text;    /* of a string, UTF-8 */
  size_t count;  /* of an array's or an object's entries */
  char** keys;   /* of an object */
  struct json* entries;
} json;

/* Parses `bytes` bytes; ends the program, naming `source`, where they are no JSON. */
json json_parse(const char* source, const char* text, size_t bytes);
void json_free(json* value);

/* An object's entry, or NULL where it has none of that name or holds null. `object` may be NULL. */
const json* json_find(const json* object, const char* key);

/* The same, for what must be there. */
const json* json_get(const json* object, const char* key);
double json_number(const json* object, const char* key);
double json_number_or(const json* object, const char* key, double otherwise);
const char* json_string(const json* object, const char* key);

#endif
