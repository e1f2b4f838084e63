#include "cpu/beam.h"

#include <math.h>

#include <algorithm>
#include <vector>

namespace fastrnn::cpu {

namespace {

struct Hypothesis {
  float key, score, increment;
  int64_t step, beam, token;
};

class Sentence {
 public:
  Sentence(const Beams& beams, const Candidates& candidates, int64_t length, int64_t index)
      : all_(beams), candidates_(candidates), length_(length), index_(index), first_(index * beams.beams) {}

  void step(const Live& live) {
    const int64_t beams = all_.beams, at = index_ * candidates_.count;
    const bool may_end = length_ >= all_.min_length[index_], at_limit = length_ >= all_.max_length[index_];
    float* scores = all_.scores + first_;
    before_.assign(scores, scores + beams);
    for (int64_t k = 0; candidates_.normalizers && k < beams; ++k)
      all_.broken[index_] |= before_[k] > -INFINITY && isnan(candidates_.normalizers[first_ + k]);
    offered_.clear();
    cut_.clear();
    int64_t going = 0, ended = 0;
    float best = -INFINITY;
    for (int64_t c = 0; c < candidates_.count && going < beams; ++c) {
      const float value = candidates_.values[at + c];
      if (!(value > -INFINITY)) continue;
      const int64_t parent = candidates_.indices[at + c] / candidates_.vocabulary;
      const int64_t token = candidates_.indices[at + c] % candidates_.vocabulary;
      const Hypothesis found = hypothesis(value, parent, token);
      if (std::find(all_.eos, all_.eos + all_.ends, token) != all_.eos + all_.ends) {
        if (may_end && c < beams) {
          offered_.push_back(found);
          ++ended;
        }
        continue;
      }
      best = going == 0 ? value : std::max(best, value);
      put(live, going, token, parent, found.increment);
      scores[going++] = value;
      if (at_limit) cut_.push_back(found);
    }
    for (int64_t k = going; k < beams; ++k) {
      put(live, k, all_.eos[0], k, -INFINITY);
      scores[k] = -INFINITY;
    }
    offered_.insert(offered_.end(), cut_.begin(), cut_.end());
    keep_best();
    all_.count[index_] += ended;
    all_.done[index_] |= at_limit || going == 0 || ruled(best);
    if (all_.done[index_]) std::fill(scores, scores + beams, -INFINITY);
  }

 private:
  Hypothesis hypothesis(float value, int64_t parent, int64_t token) const {
    float score = value / all_.divisor[length_] + all_.bonus[length_];
    if (candidates_.extra) score += candidates_.extra[first_ + parent];
    return {score, score, value - before_[parent], length_ - 1, parent, token};
  }

  void put(const Live& live, int64_t k, int64_t token, int64_t parent, float increment) const {
    live.tokens[first_ + k] = token;
    live.parents[first_ + k] = parent;
    live.rows[first_ + k] = first_ + parent;
    live.increments[first_ + k] = increment;
  }

  // The best of what was finished before and what is offered; among equals what came first.
  void keep_best() {
    if (offered_.empty()) return;
    merged_.clear();
    for (int64_t k = first_; k < first_ + all_.beams; ++k)
      merged_.push_back({all_.key[k], all_.score[k], all_.increment[k], all_.step[k], all_.beam[k], all_.token[k]});
    merged_.insert(merged_.end(), offered_.begin(), offered_.end());
    std::stable_sort(merged_.begin(), merged_.end(),
                     [](const Hypothesis& a, const Hypothesis& b) { return a.key > b.key; });
    for (int64_t k = 0; k < all_.beams; ++k) {
      const Hypothesis& kept = merged_[k];
      all_.key[first_ + k] = kept.key;
      all_.score[first_ + k] = kept.score;
      all_.increment[first_ + k] = kept.increment;
      all_.step[first_ + k] = kept.step;
      all_.beam[first_ + k] = kept.beam;
      all_.token[first_ + k] = kept.token;
    }
  }

  bool ruled(float best) const {
    const float* key = all_.key + first_;
    if (all_.rule == StopRule::first) return all_.count[index_] >= all_.enough;
    if (all_.rule == StopRule::heuristic)
      return best / all_.divisor[length_] + all_.bonus[length_] <= key[all_.beams - 1];
    if (all_.rule == StopRule::never) return false;
    const int64_t next = std::min(length_ + 1, all_.longest);
    return best / all_.largest_divisor[next] + all_.largest_bonus[next] <= key[all_.wanted - 1];
  }

  const Beams& all_;
  const Candidates& candidates_;
  const int64_t length_, index_, first_;
  inline static thread_local std::vector<float> before_;
  inline static thread_local std::vector<Hypothesis> offered_, cut_, merged_;
};

}  // namespace

int64_t beam_step(const Beams& beams, const Candidates& candidates, int64_t length, const Live& live) {
  for (int64_t sentence = 0; sentence < beams.sentences; ++sentence)
    Sentence(beams, candidates, length, sentence).step(live);
  const auto all = [&](const uint8_t* flags) { return std::count(flags, flags + beams.sentences, 0); };
  return all(beams.broken) < beams.sentences ? -1 : all(beams.done);
}

void trace_back(const Trace* steps, int64_t batch, int64_t beams, int64_t wanted, int64_t longest, const int64_t* step,
                const int64_t* beam, const int64_t* token, const float* increment, int64_t* tokens, float* log_probs) {
  for (int64_t i = 0; i < batch * wanted; ++i) {
    const int64_t sentence = i / wanted;
    int64_t at = beam[i];
    for (int64_t t = step[i]; t >= 0; --t) {
      const int64_t from = sentence * beams + at;
      const bool last = t == step[i];
      tokens[i * longest + t] = last ? token[i] : steps[t].tokens[from];
      log_probs[i * longest + t] = last ? increment[i] : steps[t].increments[from];
      if (!last) at = steps[t].parents[from];
    }
  }
}

}  // namespace fastrnn::cpu
