// What NVIDIA's header of this name declares, as far as it is emulated.
#pragma once
#include "cusim/half.h"
