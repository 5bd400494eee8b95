// routing_map on the CPU: a stable counting sort of the slots by expert.
//
// Blocks of kBlock slots are counted in parallel, a serial scan over (expert, block) turns the
// counts into first rows, and the blocks are placed in parallel. Integers only: the result does not
// depend on the number of threads.
#include <utility>

#include "common/cpu.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int64_t kBlock = 4096;

struct Slots {
    const int32_t* base;  // [tokens, topk]
    int64_t tokens, topk, stride, num_experts;
};

// The slots of one block, in order: visit(slot, token, expert), expert = -1 where the slot is
// dropped.
template <typename Visit>
void visit_slots(const Slots& ids, int64_t block, const Visit& visit) {
    const auto [base, tokens, topk, stride, num_experts] = ids;
    const int64_t begin = block * kBlock;
    const int64_t end = std::min(begin + kBlock, tokens * topk);
    int64_t token = begin / topk, j = begin % topk;
    for (int64_t slot = begin; slot < end; ++slot) {
        const int32_t id = base[token * stride + j];
        visit(slot, token, id >= 0 && id < num_experts ? id : -1);
        if (++j == topk) j = 0, ++token;
    }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> routing_map(const Tensor& ids, int64_t num_experts) {
    const int64_t slots = ids.sizes()[0] * ids.sizes()[1];
    const int64_t blocks = (slots + kBlock - 1) / kBlock;
    Tensor offsets = empty_like_device(ids, {num_experts + 1}, ScalarType::Int);
    Tensor row_token = empty_like_device(ids, {slots}, ScalarType::Int);
    Tensor slot_row = empty_like_device(ids, {ids.sizes()[0], ids.sizes()[1]}, ScalarType::Int);
    const Slots view{data<int32_t>(ids), ids.sizes()[0], ids.sizes()[1], ids.stride(0),
                     num_experts};
    int32_t* first_row = mutable_data<int32_t>(offsets);
    int32_t* token_of = mutable_data<int32_t>(row_token);
    int32_t* row_of = mutable_data<int32_t>(slot_row);

    std::vector<int32_t> next_row(blocks * num_experts, 0);  // [blocks, E]
    parallel(blocks, 4, [&](int64_t block) {
        int32_t* counts = &next_row[block * num_experts];
        visit_slots(view, block, [&](int64_t, int64_t, int32_t expert) {
            if (expert >= 0) ++counts[expert];
        });
    });
    int32_t row = 0;
    for (int64_t expert = 0; expert < num_experts; ++expert) {
        first_row[expert] = row;
        for (int64_t block = 0; block < blocks; ++block) {
            row += std::exchange(next_row[block * num_experts + expert], row);
        }
    }
    first_row[num_experts] = row;
    std::fill(token_of + row, token_of + slots, -1);
    parallel(blocks, 4, [&](int64_t block) {
        int32_t* next = &next_row[block * num_experts];
        visit_slots(view, block, [&](int64_t slot, int64_t token, int32_t expert) {
            if (expert >= 0) token_of[next[expert]] = static_cast<int32_t>(token);
            row_of[slot] = expert >= 0 ? next[expert]++ : -1;
        });
    });
    return {offsets, row_token, slot_row};
}

DSA_REGISTER_CPU(m) { m.impl("routing_map", TORCH_BOX(&routing_map)); }

}  // namespace dsa::DSA_ISA
