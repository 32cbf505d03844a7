//! Which parameter stands where in the fit, and how much of each a step's time holds.

use std::collections::BTreeMap;

use plumbline_bundles::{
    Dispatch, DispatchCosts, HostCost, engine_profile::OperatorScales, stats::percentile_of_sorted,
};

use super::{
    fit::{ClassTimes, Observation},
    solve::Parameter,
};

/// The parameters of a step-time fit: a host cost in three parts, three launching costs a dispatch, five operator scales.
///
/// The host cost is shared: scheduling, preparing inputs and reading tokens are the same code whichever way the
/// kernels are launched. What differs between dispatches is launching, which runs while the GPU computes.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    dispatches: Vec<Dispatch>,
}

const SHARED: usize = 3;
/// Launching: per launch, per sequence, after an idle gap.
const PER_DISPATCH: usize = 3;

impl Layout {
    pub(super) fn new(observations: &[&Observation]) -> Self {
        let is_seen = |d: &Dispatch| observations.iter().any(|o| o.dispatch == *d);
        Self { dispatches: Dispatch::ALL.into_iter().filter(is_seen).collect() }
    }

    pub(super) fn dispatches(&self) -> &[Dispatch] {
        &self.dispatches
    }

    /// Where the operator scales begin: all before are host costs.
    pub(super) fn num_host(&self) -> usize {
        SHARED + self.dispatches.len() * PER_DISPATCH
    }

    fn of_dispatch(&self, dispatch: Dispatch) -> Option<usize> {
        let at = self.dispatches.iter().position(|d| *d == dispatch)?;
        Some(SHARED + at * PER_DISPATCH)
    }

    pub(super) fn parameters(
        &self,
        observations: &[&Observation],
        prior: &BTreeMap<Dispatch, DispatchCosts>,
        scales: &OperatorScales,
    ) -> Vec<Parameter> {
        let costs = |dispatch: &Dispatch| prior.get(dispatch).cloned().unwrap_or_default();
        let mean = |part: fn(&HostCost) -> f64| {
            let all = self.dispatches.iter().map(|d| part(&costs(d).host_pre));
            all.sum::<f64>() / self.dispatches.len().max(1) as f64
        };
        let shared = |part: &str, prior, width, max| host_cost(format!("host_pre.{part}"), prior, width, max);
        let mut all = vec![
            shared("constant_ns", mean(|c| c.constant_ns), 1e6, 1e9),
            shared("per_seq_ns", mean(|c| c.per_seq_ns), 2e4, 1e7),
            shared("per_token_ns", mean(|c| c.per_token_ns), 50.0, 1e5),
        ];
        for dispatch in &self.dispatches {
            let costs = costs(dispatch);
            let name = |part: &str| format!("{}.{part}", dispatch.name());
            // A full graph is one launch: its cost cannot be told from the constant.
            let width = match dispatch {
                Dispatch::Eager => 4e4,
                Dispatch::PiecewiseGraph => 1e5,
                Dispatch::FullGraph => 1e3,
            };
            // Launching fills half of the steps at most.
            let mut per_launch: Vec<f64> = observations
                .iter()
                .filter(|o| o.dispatch == *dispatch)
                .map(|o| o.time_ns / f64::from(o.num_launches.max(1)))
                .collect();
            per_launch.sort_by(f64::total_cmp);
            let longest = percentile_of_sorted(&per_launch, 0.5);
            all.push(host_cost(name("launch_ns"), costs.launch_ns.min(longest), width, longest));
            all.push(host_cost(name("launch_per_seq_ns"), costs.launch_per_seq_ns, 5e4, 1e7));
            all.push(host_cost(name("after_idle_ns"), costs.after_idle_ns, 5e6, 1e9));
        }
        // Engine and profiler call the same library for matrix products, whose times agree within about 1 % on a trace of
        // vLLM 0.24; their other kernels differ.
        for (part, prior, width) in [
            ("prefill_gemm", scales.prefill_gemm, 0.02),
            ("decode_gemm", scales.decode_gemm, 0.02),
            ("prefill_attention", scales.prefill_attention, 0.15),
            ("decode_attention", scales.decode_attention, 0.15),
            ("other", scales.other, 0.15),
        ] {
            all.push(Parameter { name: format!("operator_scales.{part}"), prior, width, min: 0.5, max: 2.0 });
        }
        all
    }

    /// How much of each parameter the observation's time holds, given which of launching and GPU is longer.
    ///
    /// `host_factor` is that of the observation's host.
    pub(super) fn factors(&self, o: &Observation, theta: &[f64], host_factor: f64) -> Vec<f64> {
        let scales = self.num_host();
        let mut x = vec![0.0; scales + NUM_SCALES];
        let Some(at) = self.of_dispatch(o.dispatch) else { return x };
        let seqs = host_factor * f64::from(o.batch.num_seqs);
        x[0] = host_factor;
        x[1] = seqs;
        x[2] = host_factor * f64::from(o.batch.num_tokens);
        let launching =
            [host_factor * f64::from(o.num_launches), seqs, host_factor * f64::from(u8::from(o.after_idle))];
        let launch_ns: f64 = launching.iter().zip(&theta[at..]).map(|(x, t)| x * t).sum();
        if gpu_ns(&o.gpu, &theta[scales..]) >= launch_ns {
            x[scales..].copy_from_slice(&classes(&o.gpu));
        } else {
            x[at..at + PER_DISPATCH].copy_from_slice(&launching);
        }
        x
    }

    /// A dispatch's fitted costs.
    pub(super) fn costs(
        &self,
        dispatch: Dispatch,
        theta: &[f64],
        residual_quantiles: Vec<f64>,
    ) -> DispatchCosts {
        let own =
            self.of_dispatch(dispatch).map_or(&[0.0; PER_DISPATCH][..], |at| &theta[at..at + PER_DISPATCH]);
        DispatchCosts {
            host_pre: HostCost { constant_ns: theta[0], per_seq_ns: theta[1], per_token_ns: theta[2] },
            // A synchronous step does not tell work before its kernels from work after them.
            host_post: HostCost::default(),
            launch_ns: own[0],
            launch_per_seq_ns: own[1],
            after_idle_ns: own[2],
            residual_quantiles,
        }
    }

    pub(super) fn scales(&self, theta: &[f64]) -> OperatorScales {
        let scales = &theta[self.num_host()..];
        OperatorScales {
            prefill_gemm: scales[0],
            decode_gemm: scales[1],
            prefill_attention: scales[2],
            decode_attention: scales[3],
            other: scales[4],
        }
    }

    /// Starting values at which launching outlasts the GPU.
    pub(super) fn launch_bound_start(&self, parameters: &[Parameter]) -> Vec<f64> {
        let launches: Vec<usize> = self.dispatches.iter().filter_map(|d| self.of_dispatch(*d)).collect();
        parameters
            .iter()
            .enumerate()
            .map(|(i, q)| if launches.contains(&i) { q.max } else { q.prior })
            .collect()
    }
}

fn host_cost(name: String, prior: f64, width: f64, max: f64) -> Parameter {
    Parameter { name, prior, width, min: 0.0, max }
}

/// Classes of operators that have a scale of their own.
const NUM_SCALES: usize = 5;

fn classes(gpu: &ClassTimes) -> [f64; NUM_SCALES] {
    [gpu.prefill_gemm, gpu.decode_gemm, gpu.prefill_attention, gpu.decode_attention, gpu.other]
}

fn gpu_ns(gpu: &ClassTimes, scales: &[f64]) -> f64 {
    classes(gpu).iter().zip(scales).map(|(time, scale)| time * scale).sum()
}
