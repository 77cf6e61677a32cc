// How many tokens a tile has at most (`tiles.cuh`), for those who make tiles, too.
#pragma once

constexpr int TILE_TOKENS = 64;
