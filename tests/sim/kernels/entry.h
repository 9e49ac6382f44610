// How the kernels of this folder are called from Python: plain C functions that give null or what
// went wrong.
#pragma once

#define SIM_ENTRY extern "C" __attribute__((visibility("default"))) const char*
