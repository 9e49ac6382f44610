// Mistakes that can be planted in the kernels of this folder, to see them found.
#pragma once

enum class Mistake {
  none,
  early_release,     // a stage is given back before the product that reads it was waited for
  no_release,        // stages are never given back
  early_read,        // the accumulators are read before the wait
  no_copy_wait,      // a stage is read before its copies were waited for
  no_block_barrier,  // a stage is overwritten while another warp may still read it
};
