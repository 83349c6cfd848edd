// Every instantiation of the CUDA kernels, on the functions of device.h.
#include "../../csrc/cuda/bfloat16.cu"
#include "../../csrc/cuda/double.cu"
#include "../../csrc/cuda/float.cu"
#include "../../csrc/cuda/half.cu"
