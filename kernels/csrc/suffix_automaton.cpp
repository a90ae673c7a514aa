#include "suffix_automaton.h"

namespace quire {

void SuffixAutomaton::append(int32_t token) {
    text_.push_back(token);
    const int32_t position = int32_t(text_.size());
    const int32_t fresh = add(states_[std::size_t(last_)].length + 1, position);
    int32_t state = last_;
    for (; state >= 0 && next(state, token) < 0; state = states_[std::size_t(state)].link)
        set_next(state, token, fresh);
    const int32_t link = state >= 0 ? ending(state, token) : 0;
    states_[std::size_t(fresh)].link = link;
    last_ = fresh;
    State& suffix = states_[std::size_t(link)];
    repeat_ = {suffix.length, suffix.after};
    suffix.after = position;  // the latest occurrence is the one to copy next time
}

int32_t SuffixAutomaton::add(int32_t length, int32_t after) {
    states_.push_back({length, 0, after});
    return int32_t(states_.size()) - 1;
}

int32_t SuffixAutomaton::next(int32_t state, int32_t token) const {
    const State& from = states_[std::size_t(state)];
    if (from.token == token && from.next >= 0) return from.next;
    if (from.last_way < 0) return -1;
    const auto way = more_.find(key(state, token));
    return way == more_.end() ? -1 : way->second;
}

void SuffixAutomaton::set_next(int32_t state, int32_t token, int32_t target) {
    State& from = states_[std::size_t(state)];
    if (from.next < 0 || from.token == token) {
        from.token = token;
        from.next = target;
    } else if (more_.insert_or_assign(key(state, token), target).second) {
        ways_.push_back({token, from.last_way});
        from.last_way = int32_t(ways_.size()) - 1;
    }
}

// The state whose longest run is the longest of `state` and `token`; split off from a state of longer
// ones if need be.
int32_t SuffixAutomaton::ending(int32_t state, int32_t token) {
    const int32_t target = next(state, token), length = states_[std::size_t(state)].length + 1;
    const State whole = states_[std::size_t(target)];
    if (whole.length == length) return target;
    const int32_t split = add(length, whole.after);
    states_[std::size_t(split)].link = whole.link;
    states_[std::size_t(target)].link = split;
    if (whole.next >= 0) set_next(split, whole.token, whole.next);
    for (int32_t way = whole.last_way; way >= 0; way = ways_[std::size_t(way)].before) {
        const int32_t other = ways_[std::size_t(way)].token;
        set_next(split, other, next(target, other));
    }
    for (; state >= 0 && next(state, token) == target; state = states_[std::size_t(state)].link)
        set_next(state, token, split);
    return split;
}

void SuffixReader::read(int32_t token) {
    const auto& states = automaton_.states_;
    // States may have been split since: this run may be of the shorter part.
    while (state_ && length_ <= states[std::size_t(states[std::size_t(state_)].link)].length)
        state_ = states[std::size_t(state_)].link;
    int32_t target = automaton_.next(state_, token);
    while (target < 0 && state_) {
        state_ = states[std::size_t(state_)].link;
        length_ = states[std::size_t(state_)].length;
        target = automaton_.next(state_, token);
    }
    length_ = target >= 0 ? length_ + 1 : 0;
    state_ = target >= 0 ? target : 0;
}

}  // namespace quire
