// What crosses from the launch of build_union to its kernel.
#pragma once

#include <cstdint>

namespace dsa {

struct BuildUnionParams {
    const int32_t*
        indices;  // [T, topk], row stride `index_stride`: ascending, what is out of range is empty
    const int32_t* tiles;  // [num_tiles, tile_fields]: first token, tokens, first key, keys, ...
    int32_t* keys;         // [num_tiles, capacity]: the union, ascending, relative to the sequence
    int32_t* masks;        // [num_tiles, capacity]: bit t where token t of the tile selects the key
    int32_t* counts;  // [num_tiles]: keys of the union; anything above capacity if it does not fit
    int64_t index_stride;
    int64_t capacity;
    int32_t topk;
    int32_t tile_fields;
    int32_t list_block;  // lists are filled up to a multiple of it: the last key again, mask 0
};

}  // namespace dsa
