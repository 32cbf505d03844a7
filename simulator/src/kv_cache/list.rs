//! Lists through blocks: a block is taken out of the middle at no cost.

use super::BlockId;

/// A block's neighbours in a list; block 0, which is never handed out, stands for none.
#[derive(Clone, Copy, Debug)]
struct Link {
    previous: BlockId,
    next: BlockId,
}

const NONE: BlockId = BlockId(0);

/// The ends of a list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    first: BlockId,
    last: BlockId,
}

impl Ends {
    /// An empty list.
    pub const EMPTY: Self = Self { first: NONE, last: NONE };

    /// The first block.
    pub fn first(self) -> Option<BlockId> {
        (self.first != NONE).then_some(self.first)
    }
}

/// Lists that share no block.
#[derive(Clone, Debug, Default)]
pub(super) struct Links(Vec<Link>);

impl Links {
    /// Makes room for a block.
    pub fn reach(&mut self, block: BlockId) {
        if self.0.len() <= block.index() {
            self.0.resize(block.index() + 1, Link { previous: NONE, next: NONE });
        }
    }

    /// Puts a block that is in no list at the end of one.
    pub fn push_back(&mut self, ends: &mut Ends, block: BlockId) {
        self.0[block.index()] = Link { previous: ends.last, next: NONE };
        match ends.last {
            NONE => ends.first = block,
            last => self.0[last.index()].next = block,
        }
        ends.last = block;
    }

    /// Takes a block out of the list that it is in.
    pub fn remove(&mut self, ends: &mut Ends, block: BlockId) {
        let Link { previous, next } = self.0[block.index()];
        match previous {
            NONE => ends.first = next,
            previous => self.0[previous.index()].next = next,
        }
        match next {
            NONE => ends.last = previous,
            next => self.0[next.index()].previous = previous,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_leave_from_anywhere() {
        let (mut links, mut ends) = (Links::default(), Ends::EMPTY);
        links.reach(BlockId(5));
        for id in 1..=5 {
            links.push_back(&mut ends, BlockId(id));
        }
        for id in [3, 1, 5] {
            links.remove(&mut ends, BlockId(id));
        }
        links.push_back(&mut ends, BlockId(3));
        let mut order = Vec::new();
        while let Some(block) = ends.first() {
            order.push(block.0);
            links.remove(&mut ends, block);
        }
        assert_eq!(order, [2, 4, 3]);
        links.push_back(&mut ends, BlockId(1));
        assert_eq!(ends.first(), Some(BlockId(1)));
    }
}
