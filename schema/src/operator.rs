//! The operators of a forward pass: one name everywhere, with shapes, FLOPs and bytes.
//!
//! An operator's name is its Rust variant in snake case, its CUDA entry, its CSV file and its
//! command-line value. Its shape says what decides its time; [`OperatorShape::flops`] and
//! [`OperatorShape::bytes`] are the least work and traffic any implementation can do.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    batch::AttentionLoad,
    model::BF16_BYTES,
    units::{Bytes, Flops},
};

/// One operator of the dense forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operator {
    /// Gathers one row of the embedding per token.
    Embedding,
    /// Adds the residual and RMS-normalises: `residual += x; out = rms_norm(residual) * weight`.
    RmsNorm,
    /// GEMM: hidden states to queries, keys and values.
    QkvProj,
    /// RMS-normalises every query and key head in place (Qwen3).
    QkNorm,
    /// Rotates queries and keys in place.
    Rope,
    /// Writes keys and values to their slots in the paged KV cache.
    KvCacheWrite,
    /// Causal attention of prefill chunks and decodes over the paged KV cache.
    Attention,
    /// GEMM: attention output to hidden states.
    OProj,
    /// GEMM: hidden states to gate and up.
    GateUpProj,
    /// `silu(gate) * up`.
    SiluMul,
    /// GEMM: MLP activations to hidden states.
    DownProj,
    /// GEMM: the last hidden state of each sequence to logits.
    LmHead,
    /// Greedy sampling: argmax over the vocabulary.
    Sample,
    /// Sum over tensor-parallel ranks.
    AllReduce,
    /// Activations from one pipeline stage to the next.
    SendRecv,
}

impl Operator {
    /// Every operator, in the order of the forward pass.
    pub const ALL: [Self; 15] = [
        Self::Embedding,
        Self::RmsNorm,
        Self::QkvProj,
        Self::QkNorm,
        Self::Rope,
        Self::KvCacheWrite,
        Self::Attention,
        Self::OProj,
        Self::GateUpProj,
        Self::SiluMul,
        Self::DownProj,
        Self::LmHead,
        Self::Sample,
        Self::AllReduce,
        Self::SendRecv,
    ];

    /// The name used in files, kernels and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::RmsNorm => "rms_norm",
            Self::QkvProj => "qkv_proj",
            Self::QkNorm => "qk_norm",
            Self::Rope => "rope",
            Self::KvCacheWrite => "kv_cache_write",
            Self::Attention => "attention",
            Self::OProj => "o_proj",
            Self::GateUpProj => "gate_up_proj",
            Self::SiluMul => "silu_mul",
            Self::DownProj => "down_proj",
            Self::LmHead => "lm_head",
            Self::Sample => "sample",
            Self::AllReduce => "all_reduce",
            Self::SendRecv => "send_recv",
        }
    }

    /// Whether the operator is a matrix product.
    #[must_use]
    pub const fn is_gemm(self) -> bool {
        matches!(self, Self::QkvProj | Self::OProj | Self::GateUpProj | Self::DownProj | Self::LmHead)
    }

    /// Whether the operator moves data between GPUs.
    #[must_use]
    pub const fn is_collective(self) -> bool {
        matches!(self, Self::AllReduce | Self::SendRecv)
    }

    /// Names of the numbers that make up the operator's shape, as CSV columns.
    #[must_use]
    pub const fn shape_columns(self) -> &'static [&'static str] {
        match self {
            Self::Embedding | Self::RmsNorm => &["num_tokens", "hidden_size"],
            Self::QkNorm | Self::Rope => &["num_tokens", "num_q_heads", "num_kv_heads", "head_dim"],
            Self::KvCacheWrite => &["num_tokens", "num_kv_heads", "head_dim"],
            Self::Attention => &[
                "num_q_heads",
                "num_kv_heads",
                "head_dim",
                "num_prefill_seqs",
                "num_prefill_tokens",
                "prefill_kv_tokens",
                "prefill_pairs",
                "num_decode_seqs",
                "decode_kv_tokens",
                "max_decode_kv_tokens",
            ],
            Self::QkvProj | Self::OProj | Self::GateUpProj | Self::DownProj | Self::LmHead => {
                &["m", "n", "k"]
            }
            Self::SiluMul => &["num_tokens", "intermediate_size"],
            Self::Sample => &["num_seqs", "vocab_size"],
            Self::AllReduce | Self::SendRecv => &["message_bytes", "num_ranks"],
        }
    }
}

impl fmt::Display for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Operator {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|op| op.name() == text).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|op| op.name()).collect();
            format!("expected one of {}, found `{text}`", names.join(", "))
        })
    }
}

/// Most numbers in any operator's shape.
pub const MAX_SHAPE_COLUMNS: usize = 10;

/// The head layout of an attention layer on one GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Heads {
    /// Query heads.
    pub num_q_heads: u32,
    /// Key and value heads.
    pub num_kv_heads: u32,
    /// Elements of one head.
    pub head_dim: u32,
}

/// What decides an operator's time: the dimensions of one launch.
///
/// All tensors are bf16, row-major: `[num_tokens, width]`; a GEMM computes
/// `[m, k] x [n, k]^T -> [m, n]`, as weights are stored `[out_features, in_features]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperatorShape {
    /// `ids[num_tokens] -> [num_tokens, hidden_size]`.
    Embedding {
        /// Tokens of the step.
        num_tokens: u32,
        /// Width of a row.
        hidden_size: u32,
    },
    /// `x, residual [num_tokens, hidden_size] -> out, residual`.
    RmsNorm {
        /// Tokens of the step.
        num_tokens: u32,
        /// Width of a row.
        hidden_size: u32,
    },
    /// In place on the query and key parts of `qkv [num_tokens, (q + 2 kv) * head_dim]`.
    QkNorm {
        /// Tokens of the step.
        num_tokens: u32,
        /// Head layout.
        heads: Heads,
    },
    /// In place on the query and key parts of `qkv`, with fp32 `cos_sin [max_positions, head_dim]`.
    Rope {
        /// Tokens of the step.
        num_tokens: u32,
        /// Head layout.
        heads: Heads,
    },
    /// Key and value parts of `qkv` to `cache [num_blocks, block_size, num_kv_heads, head_dim]`, two of them.
    KvCacheWrite {
        /// Tokens of the step.
        num_tokens: u32,
        /// Key and value heads.
        num_kv_heads: u32,
        /// Elements of one head.
        head_dim: u32,
    },
    /// `q [num_tokens, num_q_heads, head_dim]` over the paged cache `-> [num_tokens, num_q_heads * head_dim]`.
    Attention {
        /// Head layout.
        heads: Heads,
        /// What the step's sequences ask for.
        load: AttentionLoad,
    },
    /// `[m, k] x [n, k]^T -> [m, n]`.
    Gemm {
        /// Rows: tokens (or sequences, for the LM head).
        m: u32,
        /// Output features.
        n: u32,
        /// Input features.
        k: u32,
    },
    /// `gate_up [num_tokens, 2 * intermediate_size] -> [num_tokens, intermediate_size]`.
    SiluMul {
        /// Tokens of the step.
        num_tokens: u32,
        /// Width of the output.
        intermediate_size: u32,
    },
    /// `logits [num_seqs, vocab_size] -> ids [num_seqs]`.
    Sample {
        /// Sequences that get a token.
        num_seqs: u32,
        /// Width of the logits.
        vocab_size: u32,
    },
    /// A message of `message_bytes` among `num_ranks` GPUs.
    Collective {
        /// Bytes that each rank contributes.
        message_bytes: u64,
        /// GPUs taking part.
        num_ranks: u32,
    },
}

impl OperatorShape {
    /// The shape's numbers, in the order of [`Operator::shape_columns`].
    #[must_use]
    pub fn values(&self) -> Vec<u64> {
        let mut numbers = [0; MAX_SHAPE_COLUMNS];
        let len = self.fill_values(&mut numbers);
        numbers[..len].to_vec()
    }

    /// Writes the shape's numbers to the front of `numbers` and returns how many there are; allocates nothing.
    pub fn fill_values(&self, numbers: &mut [u64; MAX_SHAPE_COLUMNS]) -> usize {
        let mut fill = |values: &[u64]| {
            numbers[..values.len()].copy_from_slice(values);
            values.len()
        };
        match *self {
            Self::Embedding { num_tokens, hidden_size } | Self::RmsNorm { num_tokens, hidden_size } => {
                fill(&[num_tokens, hidden_size].map(u64::from))
            }
            Self::QkNorm { num_tokens, heads } | Self::Rope { num_tokens, heads } => {
                let Heads { num_q_heads, num_kv_heads, head_dim } = heads;
                fill(&[num_tokens, num_q_heads, num_kv_heads, head_dim].map(u64::from))
            }
            Self::KvCacheWrite { num_tokens, num_kv_heads, head_dim } => {
                fill(&[num_tokens, num_kv_heads, head_dim].map(u64::from))
            }
            Self::Attention { heads, load } => fill(&[
                heads.num_q_heads.into(),
                heads.num_kv_heads.into(),
                heads.head_dim.into(),
                load.num_prefill_seqs.into(),
                load.num_prefill_tokens.into(),
                load.prefill_kv_tokens,
                load.prefill_pairs,
                load.num_decode_seqs.into(),
                load.decode_kv_tokens,
                load.max_decode_kv_tokens.into(),
            ]),
            Self::Gemm { m, n, k } => fill(&[m, n, k].map(u64::from)),
            Self::SiluMul { num_tokens, intermediate_size } => {
                fill(&[num_tokens, intermediate_size].map(u64::from))
            }
            Self::Sample { num_seqs, vocab_size } => fill(&[num_seqs, vocab_size].map(u64::from)),
            Self::Collective { message_bytes, num_ranks } => fill(&[message_bytes, num_ranks.into()]),
        }
    }

    /// Whether this is a shape that `operator` has.
    #[must_use]
    pub const fn is_of(&self, operator: Operator) -> bool {
        match self {
            Self::Embedding { .. } => matches!(operator, Operator::Embedding),
            Self::RmsNorm { .. } => matches!(operator, Operator::RmsNorm),
            Self::QkNorm { .. } => matches!(operator, Operator::QkNorm),
            Self::Rope { .. } => matches!(operator, Operator::Rope),
            Self::KvCacheWrite { .. } => matches!(operator, Operator::KvCacheWrite),
            Self::Attention { .. } => matches!(operator, Operator::Attention),
            Self::Gemm { .. } => operator.is_gemm(),
            Self::SiluMul { .. } => matches!(operator, Operator::SiluMul),
            Self::Sample { .. } => matches!(operator, Operator::Sample),
            Self::Collective { .. } => operator.is_collective(),
        }
    }

    /// The shape of `operator` from its numbers; `None` when their count or size does not fit.
    #[must_use]
    pub fn from_values(operator: Operator, values: &[u64]) -> Option<Self> {
        if values.len() != operator.shape_columns().len() {
            return None;
        }
        let at = |i: usize| u32::try_from(values[i]).ok();
        Some(match operator {
            Operator::Embedding => Self::Embedding { num_tokens: at(0)?, hidden_size: at(1)? },
            Operator::RmsNorm => Self::RmsNorm { num_tokens: at(0)?, hidden_size: at(1)? },
            Operator::QkNorm | Operator::Rope => {
                let heads = Heads { num_q_heads: at(1)?, num_kv_heads: at(2)?, head_dim: at(3)? };
                if operator == Operator::Rope {
                    Self::Rope { num_tokens: at(0)?, heads }
                } else {
                    Self::QkNorm { num_tokens: at(0)?, heads }
                }
            }
            Operator::KvCacheWrite => {
                Self::KvCacheWrite { num_tokens: at(0)?, num_kv_heads: at(1)?, head_dim: at(2)? }
            }
            Operator::Attention => Self::Attention {
                heads: Heads { num_q_heads: at(0)?, num_kv_heads: at(1)?, head_dim: at(2)? },
                load: AttentionLoad {
                    num_prefill_seqs: at(3)?,
                    num_prefill_tokens: at(4)?,
                    prefill_kv_tokens: values[5],
                    prefill_pairs: values[6],
                    num_decode_seqs: at(7)?,
                    decode_kv_tokens: values[8],
                    max_decode_kv_tokens: at(9)?,
                },
            },
            Operator::QkvProj
            | Operator::OProj
            | Operator::GateUpProj
            | Operator::DownProj
            | Operator::LmHead => Self::Gemm { m: at(0)?, n: at(1)?, k: at(2)? },
            Operator::SiluMul => Self::SiluMul { num_tokens: at(0)?, intermediate_size: at(1)? },
            Operator::Sample => Self::Sample { num_seqs: at(0)?, vocab_size: at(1)? },
            Operator::AllReduce | Operator::SendRecv => {
                Self::Collective { message_bytes: values[0], num_ranks: at(1)? }
            }
        })
    }

    /// Floating-point operations of one launch; a multiply-add counts as two.
    ///
    /// GEMM: `2 m n k`. Attention: `4 * num_q_heads * head_dim` per query-key pair (two products
    /// of `2 * head_dim`), softmax left out as is usual (Dao 2023, FlashAttention-2, section 4.1),
    /// pairs being the causal ones only. Elementwise operators: the constants are operations per element.
    #[must_use]
    pub fn flops(&self) -> Flops {
        let product = |numbers: &[u32]| numbers.iter().map(|&x| u64::from(x)).product::<u64>();
        Flops(match *self {
            Self::Embedding { .. } | Self::KvCacheWrite { .. } => 0,
            // Add, square, accumulate, scale, weight.
            Self::RmsNorm { num_tokens, hidden_size } => 5 * product(&[num_tokens, hidden_size]),
            // Square, accumulate, scale, weight.
            Self::QkNorm { num_tokens, heads } => 4 * u64::from(num_tokens) * heads.qk_width(),
            // A pair takes four products and two sums.
            Self::Rope { num_tokens, heads } => 3 * u64::from(num_tokens) * heads.qk_width(),
            Self::Attention { heads, load } => heads.attention_flops(load).0,
            Self::Gemm { m, n, k } => 2 * product(&[m, n, k]),
            // exp, add, divide, two products.
            Self::SiluMul { num_tokens, intermediate_size } => 5 * product(&[num_tokens, intermediate_size]),
            Self::Sample { num_seqs, vocab_size } => product(&[num_seqs, vocab_size]),
            Self::Collective { message_bytes, num_ranks } => {
                message_bytes / BF16_BYTES * u64::from(num_ranks.saturating_sub(1))
            }
        })
    }

    /// Fewest bytes one launch must move through memory: each input read once, each output written once.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        let elements = |a: u32, b: u64| u64::from(a) * b;
        Bytes(match *self {
            Self::Embedding { num_tokens, hidden_size } => {
                u64::from(num_tokens) * (2 * BF16_BYTES * u64::from(hidden_size) + 4)
            }
            Self::RmsNorm { num_tokens, hidden_size } => {
                BF16_BYTES * u64::from(hidden_size) * (4 * u64::from(num_tokens) + 1)
            }
            Self::QkNorm { num_tokens, heads } => {
                2 * BF16_BYTES * elements(num_tokens, heads.qk_width())
                    + 2 * BF16_BYTES * u64::from(heads.head_dim)
            }
            // The rotation table is fp32, `head_dim` numbers a position; a position is 4 bytes.
            Self::Rope { num_tokens, heads } => {
                u64::from(num_tokens)
                    * (2 * BF16_BYTES * heads.qk_width() + 4 * u64::from(heads.head_dim) + 4)
            }
            // Keys and values are read and written; a slot is 8 bytes.
            Self::KvCacheWrite { num_tokens, num_kv_heads, head_dim } => {
                u64::from(num_tokens) * (4 * BF16_BYTES * u64::from(num_kv_heads) * u64::from(head_dim) + 8)
            }
            Self::Attention { heads, load } => heads.attention_bytes(load).0,
            Self::Gemm { m, n, k } => {
                let (m, n, k) = (u64::from(m), u64::from(n), u64::from(k));
                BF16_BYTES * (m * k + n * k + m * n)
            }
            Self::SiluMul { num_tokens, intermediate_size } => {
                3 * BF16_BYTES * elements(num_tokens, intermediate_size.into())
            }
            Self::Sample { num_seqs, vocab_size } => {
                u64::from(num_seqs) * (BF16_BYTES * u64::from(vocab_size) + 4)
            }
            Self::Collective { message_bytes, .. } => 2 * message_bytes,
        })
    }
}

impl Heads {
    /// Elements of all query heads of a token.
    #[must_use]
    #[inline]
    pub fn q_width(self) -> u64 {
        u64::from(self.num_q_heads) * u64::from(self.head_dim)
    }

    /// Elements of all key (or value) heads of a token.
    #[must_use]
    #[inline]
    pub fn kv_width(self) -> u64 {
        u64::from(self.num_kv_heads) * u64::from(self.head_dim)
    }

    /// Elements of the query and key heads of a token.
    #[must_use]
    pub fn qk_width(self) -> u64 {
        self.q_width() + self.kv_width()
    }

    /// [`OperatorShape::flops`] of attention.
    #[must_use]
    #[inline]
    pub fn attention_flops(self, load: AttentionLoad) -> Flops {
        Flops(4 * self.q_width() * (load.prefill_pairs + load.decode_kv_tokens))
    }

    /// [`OperatorShape::bytes`] of attention.
    #[must_use]
    #[inline]
    pub fn attention_bytes(self, load: AttentionLoad) -> Bytes {
        let queries = u64::from(load.num_prefill_tokens) + u64::from(load.num_decode_seqs);
        let kv_tokens = load.prefill_kv_tokens + load.decode_kv_tokens;
        Bytes(2 * BF16_BYTES * (queries * self.q_width() + kv_tokens * self.kv_width()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::StepBatch;

    const QWEN: Heads = Heads { num_q_heads: 16, num_kv_heads: 8, head_dim: 128 };

    /// Worked by hand for Qwen3-0.6B, 8 tokens.
    #[test]
    fn flops_and_bytes_match_hand_worked_figures() {
        let qkv = OperatorShape::Gemm { m: 8, n: 4096, k: 1024 };
        assert_eq!(qkv.flops(), Flops(67_108_864)); // 2 * 8 * 4096 * 1024
        assert_eq!(qkv.bytes(), Bytes(8_470_528)); // 2 * (8192 + 4194304 + 32768)
        let norm = OperatorShape::RmsNorm { num_tokens: 8, hidden_size: 1024 };
        assert_eq!(norm.bytes(), Bytes(67_584)); // 4 * 8 * 1024 * 2 + 1024 * 2
        assert_eq!(norm.flops(), Flops(40_960));
        let rope = OperatorShape::Rope { num_tokens: 8, heads: QWEN };
        assert_eq!(rope.bytes(), Bytes(102_432)); // 8 * (2 * 2 * 3072 + 4 * 128 + 4)
        let write = OperatorShape::KvCacheWrite { num_tokens: 8, num_kv_heads: 8, head_dim: 128 };
        assert_eq!(write.bytes(), Bytes(65_600)); // 8 * (4 * 2 * 1024 + 8)
        let silu = OperatorShape::SiluMul { num_tokens: 8, intermediate_size: 3072 };
        assert_eq!(silu.bytes(), Bytes(147_456)); // 3 * 2 * 8 * 3072
        let embedding = OperatorShape::Embedding { num_tokens: 8, hidden_size: 1024 };
        assert_eq!(embedding.bytes(), Bytes(32_800)); // 8 * (2 * 2 * 1024 + 4)
        let sample = OperatorShape::Sample { num_seqs: 8, vocab_size: 151_936 };
        assert_eq!(sample.bytes(), Bytes(2_431_008)); // 8 * (2 * 151936 + 4)
    }

    #[test]
    fn attention_counts_causal_pairs_and_reads_the_cache_once() {
        // A 3-token chunk after 5 cached tokens: 6 + 7 + 8 = 21 pairs over 8 tokens; a decode after 9: 10 pairs.
        let load = StepBatch::parse("3:5", "9").unwrap().shape().attention;
        let attention = OperatorShape::Attention { heads: QWEN, load };
        assert_eq!(attention.flops(), Flops(4 * 2048 * (21 + 10)));
        assert_eq!(attention.bytes(), Bytes(4 * (4 * 2048 + 18 * 1024)));
    }

    #[test]
    fn values_round_trip_for_every_operator() {
        for operator in Operator::ALL {
            let values: Vec<u64> = (1..=operator.shape_columns().len() as u64).collect();
            let shape = OperatorShape::from_values(operator, &values).unwrap();
            assert_eq!(shape.values(), values, "{operator}");
            assert!(shape.is_of(operator) && values.len() <= MAX_SHAPE_COLUMNS, "{operator}");
            assert_eq!(operator.name().parse::<Operator>().unwrap(), operator);
            assert_eq!(serde_json::to_string(&operator).unwrap(), format!("\"{operator}\""));
            assert!(OperatorShape::from_values(operator, &values[1..]).is_none());
        }
    }
}
