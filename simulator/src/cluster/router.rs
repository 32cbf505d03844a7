//! Routers: which replica a request goes to.

use std::{collections::HashMap, fmt, str::FromStr};

use plumbline_schema::WorkloadRequest;
use rand_pcg::{Pcg64, rand_core::Rng};

use thiserror::Error;

use crate::{prefix::PrefixHashes, residual::stream};

/// The routers there are, by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RouterKind {
    /// Any replica, each as likely as another.
    Random,
    /// One after the other.
    #[default]
    RoundRobin,
    /// The replica with the fewest requests not yet done; the first of equals.
    LeastOutstanding,
    /// Of two replicas drawn at random the one with fewer requests not yet done (Mitzenmacher, "The Power of Two
    /// Choices in Randomized Load Balancing", IEEE TPDS 12(10), 2001).
    PowerOfTwo,
    /// The replica that was sent the longest prefix of the prompt before, unless load is out of balance.
    PrefixAware,
}

impl RouterKind {
    /// Every router.
    pub const ALL: [Self; 5] =
        [Self::Random, Self::RoundRobin, Self::LeastOutstanding, Self::PowerOfTwo, Self::PrefixAware];

    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::LeastOutstanding => "least-outstanding",
            Self::PowerOfTwo => "power-of-two",
            Self::PrefixAware => "prefix-aware",
        }
    }

    /// Whether it looks at what replicas have to do.
    #[must_use]
    pub const fn heeds_load(self) -> bool {
        !matches!(self, Self::Random | Self::RoundRobin)
    }

    /// Builds the router.
    #[must_use]
    pub fn build(self, seed: u64, block_size: u32) -> Box<dyn Router> {
        match self {
            Self::Random => Box::new(Random(stream(seed, "router"))),
            Self::RoundRobin => Box::new(RoundRobin(0)),
            Self::LeastOutstanding => Box::new(LeastOutstanding),
            Self::PowerOfTwo => Box::new(PowerOfTwo(stream(seed, "router"))),
            Self::PrefixAware => Box::new(PrefixAware::new(block_size)),
        }
    }
}

impl fmt::Display for RouterKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for RouterKind {
    type Err = UnknownRouter;

    fn from_str(text: &str) -> Result<Self, UnknownRouter> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| UnknownRouter {
            known: Self::ALL.map(Self::name).join(", "),
            found: text.to_owned(),
        })
    }
}

/// A router's name that is not known.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("expected a router ({known}), found `{found}`")]
pub struct UnknownRouter {
    /// The names there are.
    pub known: String,
    /// The name asked for.
    pub found: String,
}

/// Chooses among the replicas of one pool.
pub trait Router: Send {
    /// The replica for a request, a number below that of `loads`.
    fn route(&mut self, request: &WorkloadRequest, loads: &Loads) -> usize;
}

/// Requests sent to each replica of a pool and not yet done, with the least of them at hand.
#[derive(Clone, Debug)]
pub struct Loads {
    num_replicas: usize,
    /// A binary tree in level order, leaves last: each node holds the lesser of its two, with its replica.
    tree: Vec<(u32, u32)>,
    first_leaf: usize,
    total: u64,
}

impl Loads {
    /// Of so many idle replicas, at least one.
    #[must_use]
    pub fn new(num_replicas: usize) -> Self {
        let leaves = num_replicas.max(1).next_power_of_two();
        let mut loads =
            Self { num_replicas, tree: vec![(u32::MAX, u32::MAX); 2 * leaves], first_leaf: leaves, total: 0 };
        (0..num_replicas).for_each(|replica| loads.set(replica, 0));
        loads
    }

    /// Replicas.
    #[must_use]
    pub fn len(&self) -> usize {
        self.num_replicas
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.num_replicas == 0
    }

    /// Requests of a replica.
    #[must_use]
    pub fn of(&self, replica: usize) -> u32 {
        self.tree[self.first_leaf + replica].0
    }

    /// The replica with the fewest, the first of equals.
    #[must_use]
    pub fn least(&self) -> usize {
        self.tree[1].1 as usize
    }

    /// Requests of all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// One request more.
    pub fn sent(&mut self, replica: usize) {
        self.total += 1;
        self.set(replica, self.of(replica) + 1);
    }

    /// One request less.
    pub fn left(&mut self, replica: usize) {
        self.total -= 1;
        self.set(replica, self.of(replica) - 1);
    }

    fn set(&mut self, replica: usize, load: u32) {
        let mut node = self.first_leaf + replica;
        self.tree[node] = (load, replica as u32);
        while node > 1 {
            node /= 2;
            let lesser = self.tree[2 * node].min(self.tree[2 * node + 1]);
            if self.tree[node] == lesser {
                break;
            }
            self.tree[node] = lesser;
        }
    }
}

struct Random(Pcg64);

impl Router for Random {
    fn route(&mut self, _request: &WorkloadRequest, loads: &Loads) -> usize {
        below(&mut self.0, loads.len())
    }
}

/// A number below `count`, each as likely to within `count / 2^64`.
fn below(stream: &mut Pcg64, count: usize) -> usize {
    ((u128::from(stream.next_u64()) * count as u128) >> 64) as usize
}

struct RoundRobin(usize);

impl Router for RoundRobin {
    fn route(&mut self, _request: &WorkloadRequest, loads: &Loads) -> usize {
        let replica = self.0 % loads.len();
        self.0 = replica + 1;
        replica
    }
}

struct LeastOutstanding;

impl Router for LeastOutstanding {
    fn route(&mut self, _request: &WorkloadRequest, loads: &Loads) -> usize {
        loads.least()
    }
}

struct PowerOfTwo(Pcg64);

impl Router for PowerOfTwo {
    fn route(&mut self, _request: &WorkloadRequest, loads: &Loads) -> usize {
        let first = below(&mut self.0, loads.len());
        if loads.len() == 1 {
            return first;
        }
        // Another one, each as likely.
        let second = (first + 1 + below(&mut self.0, loads.len() - 1)) % loads.len();
        if loads.of(second) < loads.of(first) { second } else { first }
    }
}

/// Sends a request where the longest prefix of its prompt went before, and to the least loaded replica where load is
/// out of balance or little of the prompt is known.
///
/// The rules and thresholds are those of `SGLang`'s cache-aware router (`sgl-router` 0.1, `src/policies/cache_aware.rs`,
/// `CacheAwarePolicy::select_worker`): balance counts when the most loaded replica has more than 32 requests more than
/// the least and more than 1.1 times as many; a prefix counts when it covers more than half of the prompt. It keeps
/// what it sent, not what replicas still hold, and forgets the oldest beyond a capacity.
struct PrefixAware {
    block_size: u32,
    /// The replica that was last sent each chain of blocks, and when.
    sent: HashMap<u64, (u32, u64)>,
    clock: u64,
}

const BALANCE_ABSOLUTE: u32 = 32;
const BALANCE_RELATIVE: f64 = 1.1;
const CACHE_SHARE: f64 = 0.5;
/// Blocks remembered; when there are more, the older half is forgotten.
const MAX_BLOCKS: usize = 1 << 20;

impl PrefixAware {
    fn new(block_size: u32) -> Self {
        Self { block_size: block_size.max(1), sent: HashMap::new(), clock: 0 }
    }

    /// The replica that knows most of the prompt, and the tokens that it knows.
    fn longest(&self, request: &WorkloadRequest) -> Option<(usize, u32)> {
        let mut longest = None;
        for (hash, end) in self.blocks(request) {
            let Some(&(replica, _)) = self.sent.get(&hash) else { break };
            longest = Some((replica as usize, end));
        }
        longest
    }

    fn blocks(&self, request: &WorkloadRequest) -> impl Iterator<Item = (u64, u32)> {
        let size = self.block_size;
        let count = request.num_prefill_tokens / size;
        PrefixHashes::new(request, size).take(count as usize).zip((1..).map(move |block| block * size))
    }

    fn remember(&mut self, request: &WorkloadRequest, replica: usize) {
        self.clock += 1;
        let now = self.clock;
        let blocks: Vec<u64> = self.blocks(request).map(|(hash, _)| hash).collect();
        self.sent.extend(blocks.into_iter().map(|hash| (hash, (replica as u32, now))));
        if self.sent.len() > MAX_BLOCKS {
            let mut times: Vec<u64> = self.sent.values().map(|&(_, time)| time).collect();
            let middle = times.len() / 2;
            let (_, &mut cut, _) = times.select_nth_unstable(middle);
            self.sent.retain(|_, &mut (_, time)| time > cut);
        }
    }
}

impl Router for PrefixAware {
    fn route(&mut self, request: &WorkloadRequest, loads: &Loads) -> usize {
        let least = loads.least();
        // What is its own alone was sent nowhere before.
        if request.content.is_none() {
            return least;
        }
        let known = self.longest(request).filter(|&(replica, num_tokens)| {
            let (load, least) = (loads.of(replica), loads.of(least));
            let is_unbalanced = load.saturating_sub(least) > BALANCE_ABSOLUTE
                && f64::from(load) > BALANCE_RELATIVE * f64::from(least);
            let share = f64::from(num_tokens) / f64::from(request.num_prefill_tokens);
            !is_unbalanced && share > CACHE_SHARE
        });
        let replica = known.map_or(least, |(replica, _)| replica);
        self.remember(request, replica);
        replica
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use plumbline_schema::{Nanos, PromptContent};
    use proptest::prelude::*;

    use super::*;

    fn request(id: u64, prompt: u32) -> WorkloadRequest {
        WorkloadRequest::new(id, Nanos(0), prompt, 1)
    }

    proptest! {
        /// The tree's least is what a scan finds.
        #[test]
        fn the_least_loaded_is_at_hand(
            num_replicas in 1_usize..40,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 0..200),
        ) {
            let mut loads = Loads::new(num_replicas);
            let mut plain = vec![0_u32; num_replicas];
            for (index, is_more) in changes {
                let replica = index.index(num_replicas);
                if is_more {
                    loads.sent(replica);
                    plain[replica] += 1;
                } else if plain[replica] > 0 {
                    loads.left(replica);
                    plain[replica] -= 1;
                }
                let least = (0..num_replicas).min_by_key(|&r| plain[r]);
                prop_assert_eq!(Some(loads.least()), least);
                prop_assert_eq!(loads.of(replica), plain[replica]);
                prop_assert_eq!(loads.total(), plain.iter().map(|&load| u64::from(load)).sum::<u64>());
            }
        }

        /// Every router names a replica that there is.
        #[test]
        fn routes_lead_somewhere(num_replicas in 1_usize..9, seed in any::<u64>()) {
            for kind in RouterKind::ALL {
                let mut router = kind.build(seed, 16);
                let mut loads = Loads::new(num_replicas);
                for id in 0..50 {
                    let replica = router.route(&request(id, 100), &loads);
                    prop_assert!(replica < num_replicas, "{kind} chose {replica}");
                    loads.sent(replica);
                }
            }
        }
    }

    #[test]
    fn draws_spread_evenly_and_two_choices_balance_better() {
        let spread = |kind: RouterKind| {
            let (mut router, mut loads) = (kind.build(3, 16), Loads::new(50));
            for id in 0..5000 {
                let replica = router.route(&request(id, 10), &loads);
                loads.sent(replica);
            }
            let of: Vec<u32> = (0..50).map(|replica| loads.of(replica)).collect();
            of.iter().max().unwrap() - of.iter().min().unwrap()
        };
        assert_eq!(spread(RouterKind::RoundRobin), 0);
        assert_eq!(spread(RouterKind::LeastOutstanding), 0);
        assert!(spread(RouterKind::PowerOfTwo) <= 8, "{}", spread(RouterKind::PowerOfTwo));
        assert!((20..80).contains(&spread(RouterKind::Random)), "{}", spread(RouterKind::Random));
    }

    #[test]
    fn prefixes_go_where_they_went_before_until_load_is_out_of_balance() {
        let shared = |id, prefix_id| WorkloadRequest {
            content: Some(Arc::new(PromptContent {
                prefix_id: Some(prefix_id),
                prefix_len: 160,
                ..PromptContent::default()
            })),
            ..request(id, 200)
        };
        let (mut router, mut loads) = (RouterKind::PrefixAware.build(0, 16), Loads::new(3));
        let mut route = |request: &WorkloadRequest, loads: &mut Loads| {
            let replica = router.route(request, loads);
            loads.sent(replica);
            replica
        };
        assert_eq!(route(&shared(0, 7), &mut loads), 0);
        assert_eq!(route(&shared(1, 8), &mut loads), 1);
        for id in 2..30 {
            assert_eq!(route(&shared(id, 7), &mut loads), 0);
        }
        for id in 30..40 {
            route(&shared(id, 7), &mut loads);
        }
        assert!(loads.of(2) > 0, "the least loaded takes over");
    }

    #[test]
    fn names_round_trip() {
        for kind in RouterKind::ALL {
            assert_eq!(kind.to_string().parse::<RouterKind>().unwrap(), kind);
        }
        let error = "best".parse::<RouterKind>().unwrap_err().to_string();
        assert!(
            error.starts_with("expected a router (random, round-robin,") && error.ends_with("found `best`")
        );
    }
}
