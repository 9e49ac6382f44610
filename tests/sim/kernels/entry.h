// The kernels of this folder are called from Python by plain C functions that return null or the
// error's text.
#pragma once

#define SIM_ENTRY extern "C" __attribute__((visibility("default"))) const char*
