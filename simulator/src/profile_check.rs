//! Engine profiles come from files: what no engine can have is refused before a clock relies on it.

use plumbline_bundles::{EngineProfile, HostCost};

use crate::step_time::StepTimeError;

/// Checks every number of a profile.
pub(crate) fn check(profile: &EngineProfile) -> Result<(), StepTimeError> {
    let refuse = |key: String, expected, found| {
        Err(StepTimeError::InvalidProfile { profile: profile.name.clone(), key, expected, found })
    };
    let scales = &profile.operator_scales;
    for (key, value) in [
        ("host_factor", profile.host_factor),
        ("operator_scales.prefill_gemm", scales.prefill_gemm),
        ("operator_scales.decode_gemm", scales.decode_gemm),
        ("operator_scales.prefill_attention", scales.prefill_attention),
        ("operator_scales.decode_attention", scales.decode_attention),
        ("operator_scales.other", scales.other),
    ] {
        if !(value.is_finite() && value > 0.0) {
            return refuse(key.into(), "a finite factor above 0", value);
        }
    }
    let mut costs = vec![
        ("idle_threshold_ns".to_owned(), profile.idle_threshold_ns),
        ("client.admit_ns".to_owned(), profile.client.admit_ns),
        ("client.admit_per_token_ns".to_owned(), profile.client.admit_per_token_ns),
    ];
    push_host_cost(&mut costs, "client.between_steps", &profile.client.between_steps);
    for (dispatch, of) in &profile.dispatch {
        let name = format!("dispatch.{}", dispatch.name());
        push_host_cost(&mut costs, &format!("{name}.host_pre"), &of.host_pre);
        push_host_cost(&mut costs, &format!("{name}.host_post"), &of.host_post);
        costs.push((format!("{name}.launch_ns"), of.launch_ns));
        costs.push((format!("{name}.launch_per_seq_ns"), of.launch_per_seq_ns));
        costs.push((format!("{name}.after_idle_ns"), of.after_idle_ns));
        let quantiles = &of.residual_quantiles;
        let mut last = 0.0;
        for (i, &quantile) in quantiles.iter().enumerate() {
            if !(quantile.is_finite() && quantile >= last) {
                let key = format!("{name}.residual_quantiles[{i}]");
                return refuse(key, "finite ratios from 0, ascending", quantile);
            }
            last = quantile;
        }
    }
    for (key, value) in costs {
        if !(value.is_finite() && value >= 0.0) {
            return refuse(key, "a finite cost of at least 0 ns", value);
        }
    }
    Ok(())
}

fn push_host_cost(costs: &mut Vec<(String, f64)>, name: &str, cost: &HostCost) {
    costs.push((format!("{name}.constant_ns"), cost.constant_ns));
    costs.push((format!("{name}.per_seq_ns"), cost.per_seq_ns));
    costs.push((format!("{name}.per_token_ns"), cost.per_token_ns));
}
