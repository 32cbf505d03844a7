//! The operators on a CPU in f64, against which a device's results are checked.
//!
//! Straight from the definitions, one token and one head at a time; layouts as in
//! [`plumbline_schema::OperatorShape`].

use plumbline_schema::Heads;

/// Rows of `table [vocab_size, hidden_size]` named by `ids`.
#[must_use]
pub fn embedding(ids: &[u32], table: &[f64], hidden_size: usize) -> Vec<f64> {
    ids.iter().flat_map(|&id| &table[id as usize * hidden_size..][..hidden_size]).copied().collect()
}

/// The normalised rows and the new residual: `residual + x`, and that over its RMS times `weight`.
#[must_use]
pub fn rms_norm(x: &[f64], residual: &[f64], weight: &[f64], epsilon: f64) -> (Vec<f64>, Vec<f64>) {
    let sum: Vec<f64> = x.iter().zip(residual).map(|(a, b)| a + b).collect();
    let out = sum.chunks(weight.len()).flat_map(|row| normalised(row, weight, epsilon)).collect();
    (out, sum)
}

fn normalised(row: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let mean_square = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
    let scale = (mean_square + epsilon).sqrt().recip();
    row.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

/// `qkv` with every query and key head RMS-normalised.
#[must_use]
pub fn qk_norm(qkv: &[f64], q_weight: &[f64], k_weight: &[f64], heads: Heads, epsilon: f64) -> Vec<f64> {
    map_qk_heads(qkv, heads, |_, head, values| {
        let weight = if head < heads.num_q_heads as usize { q_weight } else { k_weight };
        normalised(values, weight, epsilon)
    })
}

/// `qkv` with queries and keys rotated: element `i` of a head and element `i + head_dim / 2` by the position's angle `i`.
#[must_use]
pub fn rope(qkv: &[f64], positions: &[u32], cos_sin: &[f64], heads: Heads) -> Vec<f64> {
    let head_dim = heads.head_dim as usize;
    let half = head_dim / 2;
    map_qk_heads(qkv, heads, |token, _, values| {
        let (cos, sin) = cos_sin[positions[token] as usize * head_dim..][..head_dim].split_at(half);
        let (first, second) = values.split_at(half);
        let real = (0..half).map(|i| first[i] * cos[i] - second[i] * sin[i]);
        let imaginary = (0..half).map(|i| second[i] * cos[i] + first[i] * sin[i]);
        real.chain(imaginary).collect()
    })
}

fn map_qk_heads(qkv: &[f64], heads: Heads, change: impl Fn(usize, usize, &[f64]) -> Vec<f64>) -> Vec<f64> {
    let head_dim = heads.head_dim as usize;
    let changed = (heads.num_q_heads + heads.num_kv_heads) as usize;
    let width = (changed + heads.num_kv_heads as usize) * head_dim;
    let mut out = qkv.to_vec();
    for (token, row) in out.chunks_mut(width).enumerate() {
        for (head, values) in row.chunks_mut(head_dim).take(changed).enumerate() {
            let new = change(token, head, values);
            values.copy_from_slice(&new);
        }
    }
    out
}

/// `silu(gate) * up` of `gate_up [num_tokens, 2 * intermediate_size]`.
#[must_use]
pub fn silu_mul(gate_up: &[f64], intermediate_size: usize) -> Vec<f64> {
    let row = |row: &[f64]| {
        let (gate, up) = row.split_at(intermediate_size);
        gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect::<Vec<_>>()
    };
    gate_up.chunks(2 * intermediate_size).flat_map(row).collect()
}

/// Index of the largest of each row, the lowest among equals.
#[must_use]
pub fn sample(logits: &[f64], vocab_size: usize) -> Vec<u32> {
    let best = |row: &[f64]| {
        let mut best = 0;
        for (i, logit) in row.iter().enumerate() {
            if *logit > row[best] {
                best = i;
            }
        }
        best as u32
    };
    logits.chunks(vocab_size).map(best).collect()
}

/// `x [m, k] x weight [n, k]^T -> [m, n]`.
#[must_use]
pub fn gemm(x: &[f64], weight: &[f64], k: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    x.chunks(k).flat_map(|row| weight.chunks(k).map(move |column| dot(row, column))).collect()
}

/// Attention of one sequence: `q [num_queries, num_q_heads, head_dim]` are the last queries of
/// `keys, values [kv_len, num_kv_heads, head_dim]`, and each sees the keys up to its own.
#[must_use]
pub fn attention(q: &[f64], keys: &[f64], values: &[f64], heads: Heads) -> Vec<f64> {
    let head_dim = heads.head_dim as usize;
    let (q_heads, kv_heads) = (heads.num_q_heads as usize, heads.num_kv_heads as usize);
    let kv_len = keys.len() / (kv_heads * head_dim);
    let num_queries = q.len() / (q_heads * head_dim);
    let mut out = Vec::with_capacity(q.len());
    for (i, query) in q.chunks(head_dim).enumerate() {
        let (position, head) = (kv_len - num_queries + i / q_heads, i % q_heads);
        let kv_head = head / (q_heads / kv_heads);
        let at = |key: usize| (key * kv_heads + kv_head) * head_dim;
        let scores: Vec<f64> = (0..=position)
            .map(|key| query.iter().zip(&keys[at(key)..][..head_dim]).map(|(a, b)| a * b).sum::<f64>())
            .map(|dot| dot / (head_dim as f64).sqrt())
            .collect();
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut row = vec![0.0; head_dim];
        for (key, weight) in weights.iter().enumerate() {
            row.iter_mut().zip(&values[at(key)..][..head_dim]).for_each(|(o, v)| *o += weight / total * v);
        }
        out.extend(row);
    }
    out
}

/// `||out - reference|| / ||reference||`; infinite when the lengths differ.
#[must_use]
pub fn relative_error(out: &[f64], reference: &[f64]) -> f64 {
    if out.len() != reference.len() {
        return f64::INFINITY;
    }
    let difference = out.iter().zip(reference).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
    let norm = reference.iter().map(|b| b * b).sum::<f64>();
    if norm == 0.0 && difference == 0.0 { 0.0 } else { (difference / norm).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: &[f64], expected: &[f64]) {
        assert!(relative_error(found, expected) < 1e-12, "{found:?} is not {expected:?}");
    }

    #[test]
    fn rows_match_values_worked_by_hand() {
        close(&embedding(&[1, 0], &[1.0, 2.0, 3.0, 4.0], 2), &[3.0, 4.0, 1.0, 2.0]);
        // Sum (3, 4): mean square 12.5.
        let (out, sum) = rms_norm(&[1.0, 1.0], &[2.0, 3.0], &[1.0, 2.0], 0.0);
        close(&sum, &[3.0, 4.0]);
        close(&out, &[3.0 / 12.5f64.sqrt(), 8.0 / 12.5f64.sqrt()]);
        close(&silu_mul(&[0.0, 1.0, 5.0, 2.0], 2), &[0.0, 2.0 / (1.0 + (-1.0f64).exp())]);
        assert_eq!(sample(&[1.0, 7.0, 7.0, -1.0, -2.0, -1.0], 3), [1, 0]);
        close(&gemm(&[1.0, 2.0], &[3.0, 4.0, 5.0, 6.0], 2), &[11.0, 17.0]);
    }

    #[test]
    fn rotation_turns_pairs_and_leaves_values_alone() {
        let heads = Heads { num_q_heads: 1, num_kv_heads: 1, head_dim: 2 };
        let quarter_turn = [1.0, 0.0, 0.0, 1.0];
        let qkv = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        close(&rope(&qkv, &[1], &quarter_turn, heads), &[-2.0, 1.0, -4.0, 3.0, 5.0, 6.0]);
        let normed = qk_norm(&qkv, &[1.0, 1.0], &[2.0, 2.0], heads, 0.0);
        close(&normed[..2], &[1.0 / 2.5f64.sqrt(), 2.0 / 2.5f64.sqrt()]);
        close(&normed[2..], &[6.0 / 12.5f64.sqrt(), 8.0 / 12.5f64.sqrt(), 5.0, 6.0]);
    }

    #[test]
    fn attention_is_causal_and_weighs_by_softmax() {
        let heads = Heads { num_q_heads: 2, num_kv_heads: 1, head_dim: 1 };
        let (keys, values) = ([0.0, 2f64.ln(), 100.0], [10.0, 40.0, -1.0]);
        // The second of three tokens sees two keys; head 0 asks for 1, head 1 for nothing.
        let out = attention(&[1.0, 0.0, 1.0, 0.0], &keys, &values, heads);
        close(&out[..2], &[(10.0 + 2.0 * 40.0) / 3.0, 25.0]);
        close(&out[3..], &[49.0 / 3.0]);
    }

    #[test]
    fn errors_are_relative_and_nan_never_passes() {
        assert!((relative_error(&[3.0, 4.0], &[3.0, 5.0]) - 1.0 / 34f64.sqrt()).abs() < 1e-15);
        assert!(relative_error(&[f64::NAN], &[1.0]).is_nan());
        assert!(relative_error(&[1.0], &[1.0, 2.0]).is_infinite());
    }
}
