/* One canvas: noise, denoising steps until it is stable, the draft. */
#ifndef EMBED_CANVAS_H_
#define EMBED_CANVAS_H_

#include "passes.h"

typedef struct canvas_result {
  int32_t steps;
  int32_t* draft; /* [canvas_length], in host memory: the caller frees it */
} canvas_result;

/* Canvas number `index` of a request with this seed, after what the cache holds. */
canvas_result denoise_canvas(passes* p, int64_t seed, int32_t index);

#endif
