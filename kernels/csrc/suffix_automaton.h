// Every run of tokens of a growing text, and where each stood last (kernels/suffix_automaton).
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace quire {

// (length, position after it) of a run that stands in a text.
using Match = std::pair<int32_t, int32_t>;

class SuffixAutomaton {
public:
    void append(int32_t token);
    const std::vector<int32_t>& text() const { return text_; }
    Match repeat() const { return repeat_; }

private:
    friend class SuffixReader;

    // Of all runs that end at the same positions. Nearly every state has one way out; those with
    // more have the others in `more_`, and their tokens in `ways_`, `last_way` and those before it.
    struct State {
        int32_t length, link, after;  // of the longest run; of its longest suffix elsewhere
        int32_t token = 0, next = -1, last_way = -1;
    };
    struct Way {
        int32_t token, before;
    };

    static uint64_t key(int32_t state, int32_t token) {
        return uint64_t(uint32_t(state)) << 32 | uint32_t(token);
    }
    int32_t add(int32_t length, int32_t after);
    int32_t next(int32_t state, int32_t token) const;
    void set_next(int32_t state, int32_t token, int32_t target);
    int32_t ending(int32_t state, int32_t token);

    std::vector<int32_t> text_;
    std::vector<State> states_{State{0, -1, 0}};
    std::vector<Way> ways_;
    std::unordered_map<uint64_t, int32_t> more_;
    int32_t last_ = 0;
    Match repeat_{0, 0};
};

// Follows another text through an automaton, which may grow meanwhile and must outlive it.
class SuffixReader {
public:
    explicit SuffixReader(const SuffixAutomaton& automaton) : automaton_(automaton) {}
    void read(int32_t token);
    Match match() const { return {length_, automaton_.states_[std::size_t(state_)].after}; }

private:
    const SuffixAutomaton& automaton_;
    int32_t state_ = 0, length_ = 0;
};

}  // namespace quire
