//! The CUDA path against the CPU path, in every launch regime.

use crate::plan::softmax::Thresholds;
use crate::reduction::Reduction;
use crate::softmax::CrossEntropy;
use candle_core::{DType, Device, Result, Tensor, Var};
use std::cell::Cell;

thread_local! {
    /// The thresholds of this thread's plans: lowered to reach each regime with small rows.
    pub(super) static THRESHOLDS: Cell<Thresholds> = Cell::new(Thresholds::default());
}

/// Regimes by the thresholds that send small rows there. `lone_rows: 0` keeps them out of the single block.
fn regimes() -> Vec<(&'static str, Thresholds)> {
    let usual = Thresholds { lone_rows: 0, ..Thresholds::default() };
    vec![
        ("lone block", Thresholds::default()),
        ("warps", Thresholds { warp_bytes: 1 << 20, ..usual }),
        ("warps, rows in turn", Thresholds { warp_bytes: 1 << 20, blocks: 1, ..usual }),
        ("a block a row", Thresholds { warp_bytes: 0, split_bytes: 1 << 20, ..usual }),
        (
            "blocks, rows in turn, counted ahead",
            Thresholds { warp_bytes: 0, split_bytes: 1 << 20, blocks: 2, count_rows: 1, ..usual },
        ),
        ("cluster", Thresholds { warp_bytes: 0, split_bytes: 1 << 20, cluster_bytes: 512, ..usual }),
        ("split rows", Thresholds { warp_bytes: 0, split_bytes: 256, ..usual }),
    ]
}

/// Numbers in [-3, 3), the same in every run.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 24) as f32 * 6.0 - 3.0
        })
        .collect()
}

fn random(shape: &[usize], seed: u64, dtype: DType) -> Result<Tensor> {
    Tensor::from_vec(numbers(shape.iter().product(), seed), shape, &Device::Cpu)?.to_dtype(dtype)
}

fn indices(rows: usize, classes: usize, seed: u64) -> Result<Tensor> {
    let values = numbers(rows, seed).iter().map(|v| ((v + 3.0) / 6.0 * classes as f32) as i64).collect::<Vec<_>>();
    Tensor::from_vec(values, rows, &Device::Cpu)
}

fn plain() -> CrossEntropy {
    CrossEntropy {
        name: "cross_entropy",
        axis: 1,
        log_probs: false,
        weight: None,
        ignore_index: -100,
        label_smoothing: 0.0,
        reduction: Reduction::Mean,
        normalizer: None,
        z_loss: 0.0,
        softcap: None,
        logit_scale: 1.0,
        target_check: false,
    }
}

/// Every option at once.
fn everything(classes: usize) -> Result<CrossEntropy> {
    Ok(CrossEntropy {
        weight: Some(random(&[classes], 7, DType::F32)?.abs()?),
        label_smoothing: 0.1,
        z_loss: 0.01,
        softcap: Some(2.5),
        logit_scale: 0.7,
        ..plain()
    })
}

/// The largest deviation that rounding to `dtype` and sums in another order explain.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 4e-6,
        DType::F16 => 1.2e-3,
        _ => 1e-2,
    }
}

#[track_caller]
fn assert_close(what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), expected.dims(), "{what}");
    assert_eq!(got.dtype(), expected.dtype(), "{what}");
    let values = |t: &Tensor| {
        t.to_device(&Device::Cpu)
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f64>()
            .unwrap()
    };
    let (got, expected) = (values(got), values(expected));
    let largest = expected.iter().filter(|v| v.is_finite()).fold(0f64, |m, v| m.max(v.abs()));
    for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
        let same = g == e || (g.is_nan() && e.is_nan());
        // a difference such as slope p - q keeps the rounding of its larger operands
        let close = (g - e).abs() <= tolerance * e.abs().max(0.1 * largest);
        assert!(same || close, "{what}: element {i} is {g:e}, expected {e:e}");
    }
}

fn with_weight_on(options: &CrossEntropy, device: &Device, dtype: DType) -> Result<CrossEntropy> {
    let acc = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let weight = options.weight.as_ref().map(|w| w.to_dtype(acc)?.to_device(device)).transpose()?;
    Ok(CrossEntropy { weight, ..options.clone() })
}

/// Compares all passes of one problem on both devices. `view` makes the logits of the operand that is on the device.
fn compare(
    what: &str,
    options: &CrossEntropy,
    logits: &Tensor,
    target: &Tensor,
    view: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    let dtype = logits.dtype();
    let on = |device: &Device| -> Result<_> {
        let options = with_weight_on(options, device, dtype)?;
        let target = target.to_device(device)?;
        let var = Var::from_tensor(&logits.to_device(device)?)?;
        let x = view(var.as_tensor())?;
        let forward = options.clone().forward(&x, &target)?;
        let rows = forward.elem_count();
        let upstream = random(&[rows], 5, forward.dtype())?.reshape(forward.shape())?.to_device(device)?;
        let grads = (&forward * &upstream)?.sum_all()?.backward()?;
        let backward = grads.get(&var).unwrap().clone();
        let (loss, grad) = options.clone().loss_and_grad(&x, &target)?;
        let own = x.detach().force_contiguous()?;
        let inplace_loss = options.clone().loss_and_grad_inplace(&own, &target)?;
        let mut results = vec![
            ("forward", forward),
            ("backward", backward),
            ("loss", loss),
            ("gradient", grad),
            ("loss in place", inplace_loss),
            ("gradient in place", own),
        ];
        if !options.log_probs {
            let (loss, s) = options.statistics(&x, &target)?;
            results.extend([
                ("row loss", loss),
                ("lse", s.lse),
                ("z-loss", s.z_loss),
                ("entropy", s.entropy),
                ("argmax", s.argmax),
                ("correct", s.correct),
            ]);
        }
        Ok(results)
    };
    for ((name, got), (_, expected)) in on(&gpu)?.iter().zip(&on(&Device::Cpu)?) {
        let acc = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        // gradients are rounded to the logits' dtype
        let tolerance = if got.dtype() == dtype { tolerance(dtype) } else { tolerance(acc) };
        assert_close(&format!("{what}, {dtype:?}, {:?}: {name}", logits.dims()), got, expected, tolerance);
    }
    Ok(())
}

const FLOATS: [DType; 4] = [DType::F32, DType::BF16, DType::F16, DType::F64];

#[test]
fn regimes_match_the_cpu() -> Result<()> {
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        // odd: every row begins elsewhere in its window
        let (rows, classes) = (5, 333);
        for dtype in FLOATS {
            let logits = random(&[rows, classes], 1, dtype)?;
            let target = indices(rows, classes, 2)?;
            compare(regime, &plain(), &logits, &target, |x| Ok(x.clone()))?;
            let weighted = CrossEntropy {
                weight: Some(random(&[classes], 7, DType::F32)?.abs()?),
                reduction: Reduction::None,
                ..plain()
            };
            compare(regime, &weighted, &logits, &target, |x| Ok(x.clone()))?;
        }
    }
    Ok(())
}

#[test]
fn regimes_match_the_cpu_with_every_option() -> Result<()> {
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        let (rows, classes) = (5, 167);
        for dtype in FLOATS {
            let logits = random(&[rows, classes], 1, dtype)?;
            compare(regime, &everything(classes)?, &logits, &indices(rows, classes, 2)?, |x| Ok(x.clone()))?;
        }
    }
    Ok(())
}

#[test]
fn probability_targets_match_the_cpu() -> Result<()> {
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        let (rows, classes) = (3, 70);
        for (dtype, of_target) in
            [(DType::F32, DType::F32), (DType::BF16, DType::F32), (DType::F16, DType::F16), (DType::F64, DType::BF16)]
        {
            let logits = random(&[rows, classes], 1, dtype)?;
            let target = random(&[rows, classes], 3, of_target)?.abs()?;
            compare(regime, &plain(), &logits, &target, |x| Ok(x.clone()))?;
            compare(regime, &everything(classes)?, &logits, &target, |x| Ok(x.clone()))?;
        }
    }
    Ok(())
}

#[test]
fn strided_logits_match_the_cpu() -> Result<()> {
    THRESHOLDS.set(Thresholds::default());
    let (n, classes, inner) = (3, 21, 10);
    for dtype in FLOATS {
        let logits = random(&[n, classes, inner], 1, dtype)?;
        let target = indices(n * inner, classes, 2)?.reshape((n, inner))?;
        compare("middle axis", &plain(), &logits, &target, |x| Ok(x.clone()))?;
        compare("middle axis", &everything(classes)?, &logits, &target, |x| Ok(x.clone()))?;
        let swapped = random(&[n, inner, classes], 1, dtype)?;
        compare("transposed", &plain(), &swapped, &target, |x| x.transpose(1, 2))?;
        let matrix = random(&[classes, n * inner], 1, dtype)?;
        compare("matrix transposed", &everything(classes)?, &matrix, &target.flatten_all()?, |x| x.t())?;
    }
    Ok(())
}

#[test]
fn unaligned_rows_match_the_cpu() -> Result<()> {
    for thresholds in [Thresholds::default(), Thresholds { warp_bytes: 0, lone_rows: 0, ..Thresholds::default() }] {
        THRESHOLDS.set(thresholds);
        let classes = 45;
        for dtype in FLOATS {
            for offset in 0..9 {
                let logits = random(&[3, classes + 9], 1, dtype)?;
                compare("narrowed", &plain(), &logits, &indices(3, classes, 2)?, |x| x.narrow(1, offset, classes))?;
            }
        }
    }
    Ok(())
}
