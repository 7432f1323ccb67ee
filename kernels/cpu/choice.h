// The next token of a row, chosen from its logits as fastgpt2/generate/sampling.py does it: the best
// one, or one drawn from their softmax after temperature and top-k. V vocabulary.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>

#include "vectors.h"

struct Choice {
    const float* times;  // (count, B, V) arrival times of clocks that run at rate 1; null: the best
    int64_t* tokens;     // (count, B), what was chosen
    float* best;         // (count, B), the largest logit of what may follow
    double temperature;
    int64_t top_k;  // 0 for no limit
    int64_t known;  // ids from here on must not follow
};

namespace {

// The token at `times` (V,), or the best one without; `scores` is space for 2 V numbers. NaN and
// infinity are left to whoever reads `best`.
int64_t choose(const Choice& choice, const float* logits, const float* times, float* scores,
               float* best) {
    const int64_t V = choice.known;
    int64_t found = 0;
    *best = -INFINITY;
    for (int64_t i = 0; i < V; i++) {
        if (logits[i] <= *best) continue;
        *best = logits[i];
        found = i;
        if (std::isnan(*best)) return found;
    }
    if (!times) return found;
    const float largest = *best;
    const float temperature = float(std::max(choice.temperature, 1e-30));
    each(logits, V, [&](int64_t i, Vec v, int64_t count) {
        store((v - largest) / temperature, scores + i, count);
    });
    float least = -INFINITY;
    if (choice.top_k > 0 && choice.top_k < V) {
        float* order = scores + V;
        std::copy(scores, scores + V, order);
        std::nth_element(order, order + choice.top_k - 1, order + V, std::greater<float>());
        least = order[choice.top_k - 1];
    }
    float first = -1;
    for (int64_t i = 0; i < V; i++) {
        if (scores[i] < least) continue;
        // exponential clocks that run at the tokens' probabilities: the first to ring
        const float rate = std::exp(scores[i]) / times[i];
        if (rate > first) {
            first = rate;
            found = i;
        }
    }
    return found;
}

}  // namespace
