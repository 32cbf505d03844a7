//! How long requests are, and what becomes of those that are too long.

use std::sync::Arc;

use rand::seq::SliceRandom;
use rand_distr::{Distribution, Uniform};
use rand_pcg::Pcg64;
use serde::{Deserialize, Serialize};

use super::{
    distribution::{CountSampler, MAX_MISSES},
    spec::{Lengths, MAX_TOKENS, SpecError, TooLong, TraceOrder, WorkloadSpec, require},
};
use crate::residual::stream;

/// Prompt and output tokens of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) prefill: u32,
    pub(super) decode: u32,
}

impl Pair {
    fn total(self) -> u64 {
        u64::from(self.prefill) + u64::from(self.decode)
    }
}

/// What became of requests that were too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TooLongCounts {
    /// Left out.
    pub num_dropped: u64,
    /// Lengths that were drawn again.
    pub num_resampled: u64,
    /// Requests that were shortened.
    pub num_clamped: u64,
}

/// Draws lengths, and keeps to the limit.
#[derive(Clone, Debug)]
pub(super) struct LengthSource {
    pairs: Pairs,
    rng: Pcg64,
    max_total_tokens: u32,
    too_long: TooLong,
    pub(super) counts: TooLongCounts,
}

#[derive(Clone, Debug)]
enum Pairs {
    Distributions {
        prefill: CountSampler,
        decode: CountSampler,
    },
    /// Each once, in this order.
    Listed {
        pairs: Arc<[Pair]>,
        order: Option<Arc<[u32]>>,
        next: usize,
    },
    Sampled {
        pairs: Arc<[Pair]>,
        index: Uniform<usize>,
    },
}

/// One draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Draw {
    Fits(Pair),
    TooLong,
    /// The trace is at its end.
    End,
}

impl LengthSource {
    /// Lengths as a checked specification describes them; `trace` are the pairs of its trace, empty for others.
    pub(super) fn new(spec: &WorkloadSpec, trace: Vec<Pair>, seed: u64) -> Result<Self, SpecError> {
        let mut rng = stream(seed, "lengths");
        let pairs = match &spec.lengths {
            Lengths::Distributions { prefill, decode } => Pairs::Distributions {
                prefill: prefill.sampler(MAX_TOKENS)?,
                decode: decode.sampler(MAX_TOKENS)?,
            },
            Lengths::Trace { order, .. } => Pairs::of_trace(trace.into(), *order, &mut rng)?,
        };
        let max_total_tokens = spec.max_total_tokens.unwrap_or(u32::MAX);
        let counts = TooLongCounts::default();
        let source = Self { pairs, rng, max_total_tokens, too_long: spec.too_long, counts };
        source.check_some_fit(spec.prefix_tokens())?;
        Ok(source)
    }

    /// Whether requests come of it at all: dropping or drawing again would otherwise never end.
    fn check_some_fit(&self, history: u32) -> Result<(), SpecError> {
        let fits = |pair: Pair| u64::from(history) + pair.total() <= u64::from(self.max_total_tokens);
        let (is_fine, expected) = if self.too_long == TooLong::Clamp {
            let is_fine = u64::from(history) + 2 <= u64::from(self.max_total_tokens);
            (is_fine, format!("at least {}, which a prefix and two tokens have", u64::from(history) + 2))
        } else {
            match &self.pairs {
                Pairs::Listed { pairs, .. } | Pairs::Sampled { pairs, .. } => {
                    let least = pairs.iter().map(|pair| u64::from(history) + pair.total()).min();
                    let least = least.unwrap_or_default();
                    (
                        pairs.iter().any(|&pair| fits(pair)),
                        format!("at least {least}, which the shortest has"),
                    )
                }
                Pairs::Distributions { prefill, decode } => {
                    let mut rng = stream(0, "bounds");
                    let mut draw = || Pair { prefill: prefill.draw(&mut rng), decode: decode.draw(&mut rng) };
                    let is_fine = (0..MAX_MISSES).any(|_| fits(draw()));
                    (is_fine, format!("a limit that one in {MAX_MISSES} requests keeps"))
                }
            }
        };
        require(is_fine, "max_total_tokens", expected, self.max_total_tokens)
    }

    /// The next request's lengths, of which the prompt begins with `history` tokens that are already there.
    pub(super) fn draw(&mut self, history: u32) -> Draw {
        let max = u64::from(self.max_total_tokens);
        loop {
            let Some(own) = self.pairs.next(&mut self.rng) else { return Draw::End };
            let total = u64::from(history) + own.total();
            if total <= max {
                return Draw::Fits(Pair { prefill: history + own.prefill, decode: own.decode });
            }
            match self.too_long {
                TooLong::Resample => self.counts.num_resampled += 1,
                TooLong::Clamp if u64::from(history) + 2 <= max => {
                    self.counts.num_clamped += 1;
                    let whole = Pair { prefill: history.saturating_add(own.prefill), decode: own.decode };
                    return Draw::Fits(clamp(whole, history, self.max_total_tokens));
                }
                TooLong::Clamp | TooLong::Drop => return Draw::TooLong,
            }
        }
    }
}

/// Shortens a prompt to what the output leaves, but not to less than `history` and one token; then the output.
pub(super) fn clamp(pair: Pair, history: u32, max_total_tokens: u32) -> Pair {
    let decode = pair.decode.min(max_total_tokens - history - 1);
    Pair { prefill: pair.prefill.min(max_total_tokens - decode), decode }
}

impl Pairs {
    fn of_trace(pairs: Arc<[Pair]>, order: TraceOrder, rng: &mut Pcg64) -> Result<Self, SpecError> {
        Ok(match order {
            TraceOrder::InOrder => Self::Listed { pairs, order: None, next: 0 },
            TraceOrder::Shuffled => {
                let mut order: Vec<u32> = (0..pairs.len() as u32).collect();
                order.shuffle(rng);
                Self::Listed { pairs, order: Some(order.into()), next: 0 }
            }
            TraceOrder::Sampled => {
                let index = Uniform::new(0, pairs.len())
                    .map_err(|_| SpecError::new("lengths.path", "a trace with requests", "none"))?;
                Self::Sampled { pairs, index }
            }
        })
    }

    fn next(&mut self, rng: &mut Pcg64) -> Option<Pair> {
        match self {
            Self::Distributions { prefill, decode } => {
                Some(Pair { prefill: prefill.draw(rng), decode: decode.draw(rng) })
            }
            Self::Listed { pairs, order, next } => {
                let index = match order {
                    Some(order) => *order.get(*next)? as usize,
                    None => *next,
                };
                *next += 1;
                pairs.get(index).copied()
            }
            Self::Sampled { pairs, index } => pairs.get(index.sample(rng)).copied(),
        }
    }
}
