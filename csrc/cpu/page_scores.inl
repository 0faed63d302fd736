// Scores of pages, from the bounds of their keys (Quest): an election of pages. Needs selection_scores.inl before it.
namespace kvcache::cpu::KVCACHE_ISA_NS {

static void page_logits(const PageScoresParams& p, int64_t begin, int64_t end) {
  vote_logits(election_of(p), begin, end);
}

static void page_vote(const PageScoresParams& p, int64_t begin, int64_t end) { vote_sums(election_of(p), begin, end); }

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
