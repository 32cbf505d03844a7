//! What is remembered of a few layouts of heads.

use plumbline_schema::Heads;

/// Something for each layout of heads.
#[derive(Debug)]
pub(super) struct ByHeads<T> {
    /// Last used first; a layout of which nothing can be remembered has `None`.
    layouts: Vec<(Heads, Option<Box<T>>)>,
}

/// Most layouts, 0.2 MB each by shipped bundles; a simulation needs one.
pub(super) const MAX_LAYOUTS: usize = 4;

impl<T> Default for ByHeads<T> {
    fn default() -> Self {
        Self { layouts: Vec::new() }
    }
}

impl<T> ByHeads<T> {
    /// What there is of a layout; made where it is new, unless there are many.
    #[inline]
    pub(super) fn get(&mut self, heads: Heads, make: impl FnOnce() -> Option<T>) -> Option<&mut T> {
        if self.layouts.first().is_none_or(|(first, _)| *first != heads) {
            self.bring_to_front(heads, make)?;
        }
        self.layouts[0].1.as_deref_mut()
    }

    #[cold]
    fn bring_to_front(&mut self, heads: Heads, make: impl FnOnce() -> Option<T>) -> Option<()> {
        let index = self.layouts.iter().position(|(other, _)| *other == heads);
        let index = index.or_else(|| {
            (self.layouts.len() < MAX_LAYOUTS).then(|| {
                self.layouts.push((heads, make().map(Box::new)));
                self.layouts.len() - 1
            })
        })?;
        self.layouts.swap(0, index);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_bounded_and_made_once() {
        let mut all = ByHeads::default();
        let mut num_made = 0;
        for _ in 0..3 {
            for num_kv_heads in 1..20u32 {
                let heads = Heads { num_q_heads: 32, num_kv_heads, head_dim: 128 };
                let made = all.get(heads, || {
                    num_made += 1;
                    (num_kv_heads != 2).then_some(num_kv_heads)
                });
                let is_known = num_kv_heads as usize <= MAX_LAYOUTS && num_kv_heads != 2;
                assert_eq!(made.copied(), is_known.then_some(num_kv_heads));
            }
        }
        assert_eq!(num_made, MAX_LAYOUTS);
    }
}
