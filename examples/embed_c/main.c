/* Runs a checkpoint through libdgemma's C interface:
 *
 *   embed_c CHECKPOINT PUZZLE [--seed N] [--canvases N] [--device cpu|cuda]
 *
 * CHECKPOINT is a folder with config.json, generation_config.json, model.safetensors and, for a
 * PUZZLE in characters, tokenizer.json. PUZZLE may also be token ids: "ids:2,105,...". Prints the
 * denoising steps of every canvas, the tokens, and the text; a square one as a grid. Stops at the
 * first end of text, or with --canvases after so many canvases whatever they hold.
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "canvas.h"
#include "common.h"
#include "text.h"

typedef struct arguments {
  const char *folder, *puzzle, *device;
  int64_t seed, canvases; /* canvases 0: one, cut at its end of text */
} arguments;

static int64_t number(const char* name, const char* text, int64_t least) {
  char* end;
  errno = 0;
  const long long value = strtoll(text, &end, 10);
  if (errno != 0 || *text == '\0' || *end != '\0' || value < least)
    die("%s: got '%s', wants a number of at least %lld", name, text, (long long)least);
  return value;
}

static arguments read_arguments(int count, char** values) {
  arguments a = {.device = "cpu"};
  for (int i = 1; i < count; ++i) {
    if (values[i][0] != '-') {
      if (a.puzzle != NULL) die("'%s': wants a checkpoint and a puzzle alone", values[i]);
      *(a.folder == NULL ? &a.folder : &a.puzzle) = values[i];
      continue;
    }
    const char* name = values[i];
    if (++i == count) die("%s: wants a value", name);
    if (strcmp(name, "--seed") == 0)
      a.seed = number(name, values[i], 0);
    else if (strcmp(name, "--canvases") == 0)
      a.canvases = number(name, values[i], 1);
    else if (strcmp(name, "--device") == 0)
      a.device = values[i];
    else
      die("%s: is not an option", name);
  }
  if (a.puzzle == NULL)
    die("usage: embed_c CHECKPOINT PUZZLE [--seed N] [--canvases N] [--device cpu|cuda]");
  return a;
}

static device open_device(const char* name) {
  if (dgemma_abi_version() != DGEMMA_ABI_VERSION)
    die("the library has ABI %d, and this program was built for %d", dgemma_abi_version(),
        DGEMMA_ABI_VERSION);
  if (strcmp(name, "cpu") == 0) return device_cpu();
#if defined(EMBED_WITH_CUDA)
  if (strcmp(name, "cuda") == 0) return device_cuda();
#endif
  die("--device: got '%s', wants cpu%s", name,
      dgemma_has_cuda() ? " or cuda" : ", which is all this build has");
}

/* "ids:2,105,..." or characters, as ids. */
static int64_t read_prompt(const arguments* a, const json* tokenizer, const config* c,
                           int32_t* ids) {
  if (strncmp(a->puzzle, "ids:", 4) != 0) return encode_turn(tokenizer, a->puzzle, ids, c->context);
  int64_t count = 0;
  for (const char* at = a->puzzle + 3; *at != '\0';) {
    char* end;
    const long id = strtol(at + 1, &end, 10);
    if (end == at + 1 || (*end != ',' && *end != '\0') || id < 0 || id >= c->vocabulary)
      die("the prompt's id number %lld is none below %lld", (long long)count,
          (long long)c->vocabulary);
    if (count == c->context)
      die("the prompt is longer than the model's context of %lld", (long long)c->context);
    ids[count++] = (int32_t)id;
    at = end;
  }
  return count;
}

static int is_end(const config* c, int32_t token) {
  for (int64_t i = 0; i < c->eos_count; ++i)
    if (c->eos[i] == token) return 1;
  return 0;
}

/* The tokens' text; as a grid where it has a square number of characters. */
static void print_text(const json* tokenizer, const int32_t* tokens, int64_t count) {
  size_t length = 0;
  for (int64_t i = 0; i < count; ++i) length += strlen(text_of(tokenizer, tokens[i]));
  const size_t side = (size_t)(sqrt((double)length) + 0.5);
  size_t column = 0;
  for (int64_t i = 0; i < count; ++i) {
    const char* text = text_of(tokenizer, tokens[i]);
    if (*text == '\0') continue;
    fputs(text, stdout);
    column += strlen(text);
    if (side * side == length && column % side == 0 && column < length) putchar('\n');
  }
  putchar('\n');
}

int main(int count, char** values) {
  const arguments a = read_arguments(count, values);
  const int by_ids = strncmp(a.puzzle, "ids:", 4) == 0;
  device d = open_device(a.device);
  static model m; /* large, for a stack */
  model_open(&m, a.folder, &d);
  const config* c = &m.config;
  json tokenizer = {0};
  if (!by_ids) tokenizer = tokenizer_open(a.folder);

  int32_t* prompt = allocate((size_t)c->context * sizeof *prompt);
  const int64_t prompt_length = read_prompt(&a, &tokenizer, c, prompt);
  const int64_t canvases = a.canvases > 0 ? a.canvases : 1;
  /* The last canvas is never encoded. */
  const int64_t positions = prompt_length + (canvases - 1) * c->canvas_length;
  if (canvases > c->context || positions + c->canvas_length > c->context)
    die("the prompt's %lld tokens and %lld canvases of %lld are more than the model's context of "
        "%lld",
        (long long)prompt_length, (long long)canvases, (long long)c->canvas_length,
        (long long)c->context);
  static passes p;
  passes_open(&p, &m, positions);

  int32_t* tokens = allocate((size_t)(canvases * c->canvas_length) * sizeof *tokens);
  int64_t kept = 0;
  encode(&p, prompt, prompt_length);
  printf("device %s\nsteps", d.name);
  for (int64_t index = 0; index < canvases; ++index) {
    const canvas_result result = denoise_canvas(&p, a.seed, (int32_t)index);
    printf(" %d", result.steps);
    memcpy(tokens + kept, result.draft, (size_t)c->canvas_length * sizeof *tokens);
    kept += c->canvas_length;
    /* Commit: the draft becomes text that the next canvas sees. */
    if (index + 1 < canvases) encode(&p, result.draft, c->canvas_length);
    free(result.draft);
  }
  if (a.canvases == 0) {
    int64_t end = 0;
    while (end < kept && !is_end(c, tokens[end])) ++end;
    if (end < kept) kept = end + 1;
  }
  printf("\ntokens");
  for (int64_t i = 0; i < kept; ++i) printf(" %d", tokens[i]);
  putchar('\n');
  if (!by_ids) print_text(&tokenizer, tokens, kept);

  free(tokens);
  free(prompt);
  passes_close(&p);
  json_free(&tokenizer);
  model_close(&m);
  device_close(&d);
  return 0;
}
