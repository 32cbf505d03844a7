//! Predictors that remember their answers: what a simulator asks, step after step.

use std::{
    cell::RefCell,
    hash::{Hash, Hasher},
    sync::Arc,
};

use plumbline_schema::{AttentionLoad, Heads, Operator, OperatorShape};

use super::{
    OutOfDomain, PredictError, Prediction, Predictors, by_heads::ByHeads, chunks::Chunks, decodes::Decodes,
};

/// Predictors that answer at once what they were asked before; every answer is that of
/// [`Predictors::predict_in_step`], bit for bit.
///
/// Answers for a batch of one number lie in tables over that number, the few that no table holds in a cache. Attention is
/// hardly ever asked twice; what its launches have in common is computed once for each layout of heads: chunks, alone or
/// beside decodes, take a sixth less time than the predictors take. Decodes alone, of which a simulation asks a load of
/// its own at every step, take less than a tenth of it where they are near loads that were asked before, as they are
/// while contexts grow. Memory follows what was asked, up to about 30 MB.
///
/// Asking needs no lock, so each thread has its own: a clone shares the predictors and starts without answers.
#[derive(Debug)]
pub struct CompiledPredictors {
    predictors: Arc<Predictors>,
    memory: RefCell<Memory>,
}

impl Clone for CompiledPredictors {
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.predictors))
    }
}

impl CompiledPredictors {
    /// Wraps predictors, with no answer remembered yet.
    #[must_use]
    pub fn new(predictors: Arc<Predictors>) -> Self {
        Self { predictors, memory: RefCell::default() }
    }

    /// The predictors that are asked.
    #[must_use]
    pub fn predictors(&self) -> &Predictors {
        &self.predictors
    }

    /// As [`Predictors::predict_in_step`].
    ///
    /// # Errors
    /// As [`Predictors::predict_in_step`]; refusals are not remembered.
    pub fn predict_in_step(
        &self,
        operator: Operator,
        shape: &OperatorShape,
        out_of_domain: OutOfDomain,
    ) -> Result<Prediction, PredictError> {
        let question = Question { operator, out_of_domain };
        let mut memory = self.memory.borrow_mut();
        if let OperatorShape::Attention { heads, load } = *shape
            && operator == Operator::Attention
            && let Some(prediction) = memory.attention(&self.predictors, heads, load, out_of_domain)
        {
            return Ok(prediction);
        }
        if let Some(prediction) = memory.get(question, shape) {
            return Ok(prediction);
        }
        let prediction = self.predictors.predict_in_step(operator, shape, out_of_domain)?;
        memory.put(question, shape, prediction);
        Ok(prediction)
    }
}

/// Whether a load is of decodes alone.
fn is_of_decodes(load: AttentionLoad) -> bool {
    let AttentionLoad { num_prefill_seqs, num_prefill_tokens, prefill_kv_tokens, prefill_pairs, .. } = load;
    num_prefill_seqs == 0 && num_prefill_tokens == 0 && prefill_kv_tokens == 0 && prefill_pairs == 0
}

/// What is asked of a shape; each kind of question has its own answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Question {
    operator: Operator,
    out_of_domain: OutOfDomain,
}

/// Operators, each asked refusing or extrapolating.
const NUM_QUESTIONS: usize = Operator::ALL.len() * 2;

impl Question {
    /// Its place among [`NUM_QUESTIONS`].
    fn place(self) -> usize {
        let refuses = usize::from(self.out_of_domain == OutOfDomain::Refuse);
        2 * self.operator as usize + refuses
    }
}

/// Answers given so far; they take no memory before the first.
#[derive(Debug, Default)]
struct Memory {
    decodes: ByHeads<Decodes>,
    chunks: ByHeads<Chunks>,
    tables: Tables,
    cache: Cache,
}

impl Memory {
    /// An answer for attention that needs no memory of the very load.
    #[inline]
    fn attention(
        &mut self,
        predictors: &Predictors,
        heads: Heads,
        load: AttentionLoad,
        out_of_domain: OutOfDomain,
    ) -> Option<Prediction> {
        if is_of_decodes(load) {
            let decodes = self.decodes.get(heads, || Decodes::new(predictors, heads))?;
            return decodes.predict(predictors, load, out_of_domain);
        }
        let chunks = self.chunks.get(heads, || Chunks::new(predictors, heads))?;
        chunks.predict(predictors, load, out_of_domain)
    }

    fn get(&mut self, question: Question, shape: &OperatorShape) -> Option<Prediction> {
        // Another operator's shape may have the same numbers; it is refused.
        if let Some((number, layout)) = by_number(shape).filter(|_| shape.is_of(question.operator))
            && let Some(prediction) = self.tables.get(question.place(), number, layout)
        {
            return Some(prediction);
        }
        self.cache.get(question, shape)
    }

    fn put(&mut self, question: Question, shape: &OperatorShape, prediction: Prediction) {
        let is_put = by_number(shape)
            .is_some_and(|(number, layout)| self.tables.put(question.place(), number, layout, prediction));
        if !is_put {
            self.cache.put(question, shape, prediction);
        }
    }
}

/// Answers whose batch is one number, by that number.
#[derive(Debug, Default)]
struct Tables {
    /// At [`Question::place`]: a table for each layout, last used first.
    by_question: Vec<Vec<Table>>,
    num_pages: usize,
}

#[derive(Debug)]
struct Table {
    layout: Layout,
    pages: Vec<Option<Box<Page>>>,
}

/// The model's numbers of a shape, 0 beyond the last.
type Layout = [u32; 3];

type Page = [Option<Prediction>; PAGE];
/// Numbers that share a page: an engine's batches grow and shrink by little.
const PAGE: usize = 32;
/// Most pages of all tables, 1 KiB each; when they are used up, all tables start anew.
const MAX_PAGES: usize = 8192;
/// Tables hold numbers below this.
const MAX_NUMBER: u32 = 1 << 16;
/// Most tables of a question; a simulation needs one or two.
const MAX_TABLES: usize = 16;

/// The number of the batch, where it is one and tables hold it, and the numbers of the model.
fn by_number(shape: &OperatorShape) -> Option<(usize, Layout)> {
    let of_heads = |heads: Heads| [heads.num_q_heads, heads.num_kv_heads, heads.head_dim];
    let (number, layout) = match *shape {
        OperatorShape::Embedding { num_tokens, hidden_size }
        | OperatorShape::RmsNorm { num_tokens, hidden_size } => (num_tokens, [hidden_size, 0, 0]),
        OperatorShape::QkNorm { num_tokens, heads } | OperatorShape::Rope { num_tokens, heads } => {
            (num_tokens, of_heads(heads))
        }
        OperatorShape::KvCacheWrite { num_tokens, num_kv_heads, head_dim } => {
            (num_tokens, [num_kv_heads, head_dim, 0])
        }
        OperatorShape::Gemm { m, n, k } => (m, [n, k, 0]),
        OperatorShape::SiluMul { num_tokens, intermediate_size } => (num_tokens, [intermediate_size, 0, 0]),
        OperatorShape::Sample { num_seqs, vocab_size } => (num_seqs, [vocab_size, 0, 0]),
        // Bytes of messages lie far apart.
        OperatorShape::Attention { .. } | OperatorShape::Collective { .. } => return None,
    };
    (number < MAX_NUMBER).then_some((number as usize, layout))
}

impl Tables {
    fn get(&mut self, place: usize, number: usize, layout: Layout) -> Option<Prediction> {
        let tables = self.by_question.get_mut(place)?;
        let index = tables.iter().position(|table| table.layout == layout)?;
        tables.swap(0, index);
        tables[0].pages.get(number / PAGE)?.as_ref()?[number % PAGE]
    }

    /// Whether there was room for another layout.
    fn put(&mut self, place: usize, number: usize, layout: Layout, prediction: Prediction) -> bool {
        if self.by_question.is_empty() {
            self.by_question.resize_with(NUM_QUESTIONS, Vec::new);
        }
        if self.num_pages == MAX_PAGES {
            self.by_question.iter_mut().for_each(Vec::clear);
            self.num_pages = 0;
        }
        let tables = &mut self.by_question[place];
        let index = tables.iter().position(|table| table.layout == layout).unwrap_or_else(|| {
            tables.push(Table { layout, pages: Vec::new() });
            tables.len() - 1
        });
        if index == MAX_TABLES {
            tables.truncate(MAX_TABLES);
            return false;
        }
        let pages = &mut tables[index].pages;
        if pages.len() <= number / PAGE {
            pages.resize_with(number / PAGE + 1, || None);
        }
        let page = &mut pages[number / PAGE];
        self.num_pages += usize::from(page.is_none());
        page.get_or_insert_with(|| Box::new([None; PAGE]))[number % PAGE] = Some(prediction);
        true
    }
}

/// All other answers: at the hash of question and shape or next to it; where all is taken, the last one stays.
#[derive(Debug, Default)]
struct Cache {
    slots: Vec<Option<Slot>>,
    num_used: usize,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    question: Question,
    shape: OperatorShape,
    prediction: Prediction,
}

/// Slots of the cache at first and at most, about 100 bytes each; it doubles when a quarter of them is in use.
const MIN_SLOTS: usize = 1 << 8;
const MAX_SLOTS: usize = 1 << 13;
/// Slots that are looked at for an answer.
const PROBES: usize = 4;

impl Cache {
    fn get(&self, question: Question, shape: &OperatorShape) -> Option<Prediction> {
        if self.slots.is_empty() {
            return None;
        }
        let slot = self.slots[self.index(question, shape)].as_ref()?;
        slot.is_of(question, shape).then_some(slot.prediction)
    }

    fn put(&mut self, question: Question, shape: &OperatorShape, prediction: Prediction) {
        let len = self.slots.len();
        if 4 * self.num_used >= len && len < MAX_SLOTS {
            let slots = std::mem::replace(&mut self.slots, vec![None; (2 * len).max(MIN_SLOTS)]);
            self.num_used = 0;
            slots.into_iter().flatten().for_each(|slot| self.place(slot));
        }
        self.place(Slot { question, shape: *shape, prediction });
    }

    fn place(&mut self, slot: Slot) {
        let index = self.index(slot.question, &slot.shape);
        self.num_used += usize::from(self.slots[index].replace(slot).is_none());
    }

    /// Where an answer is, or is to be put; the number of slots is a power of two.
    fn index(&self, question: Question, shape: &OperatorShape) -> usize {
        let mut hasher = Products(question.place() as u64);
        shape.hash(&mut hasher);
        // High bits depend on all of the numbers, low ones on low bits alone.
        let first = (hasher.finish() >> 32) as usize;
        let mask = self.slots.len() - 1;
        let is_free =
            |&index: &usize| self.slots[index].as_ref().is_none_or(|slot| slot.is_of(question, shape));
        (first..first + PROBES).map(|index| index & mask).find(is_free).unwrap_or(first & mask)
    }
}

impl Slot {
    fn is_of(&self, question: Question, shape: &OperatorShape) -> bool {
        self.question == question && self.shape == *shape
    }
}

/// A hash of a product a number, far quicker than the standard one; collisions cost time alone.
struct Products(u64);

impl Hasher for Products {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(number.into());
    }

    fn write_u64(&mut self, number: u64) {
        // 2^64 over the golden ratio, made odd.
        self.0 = (self.0.rotate_left(26) ^ number).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn write_isize(&mut self, number: isize) {
        self.write_u64(number as u64);
    }
}

#[cfg(test)]
mod tests;
