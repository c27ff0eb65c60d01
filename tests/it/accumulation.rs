//! Gradients that are accumulated over parts of a batch, in which different numbers of rows count, against those of the
//! batch at once.

use crate::common::{Random, everywhere, indices, tensor, values};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_loss::{CrossEntropyLoss, LinearCrossEntropyLoss};

const PASSAGES: usize = 6;
const PLACES: usize = 7;
const FEATURES: usize = 5;
const CLASSES: usize = 11;
/// Places that are no padding.
const LENGTHS: [usize; PASSAGES] = [7, 2, 1, 4, 3, 6];
/// Passages of each part: 14, 3 and 6 of their places count.
const PARTS: [std::ops::Range<usize>; 3] = [0..4, 4..5, 5..6];

/// Passages of different lengths, and the layer that makes their logits.
struct Data {
    hidden: Var,
    weight: Var,
    target: Tensor,
    mask: Tensor,
}

impl Data {
    fn new(device: &Device) -> Result<Self> {
        let mut random = Random::new(91);
        let mut var = |dims: &[usize]| {
            let values = random.normals(dims.iter().product(), 1.0);
            Var::from_tensor(&tensor(&values, dims, DType::F32, device)?)
        };
        let (hidden, weight) = (var(&[PASSAGES, PLACES, FEATURES])?, var(&[CLASSES, FEATURES])?);
        let place = |i: usize| (i / PLACES, i % PLACES);
        let counts = |i: usize| place(i).1 < LENGTHS[place(i).0];
        let mask: Vec<i64> = (0..PASSAGES * PLACES).map(|i| i64::from(counts(i))).collect();
        // what the padding's targets are must not matter: 99 is no class
        let target: Vec<i64> = random.classes(mask.len(), CLASSES);
        let target: Vec<i64> = target.iter().zip(&mask).map(|(&t, &counts)| if counts == 1 { t } else { 99 }).collect();
        Ok(Data {
            hidden,
            weight,
            target: indices(&target, &[PASSAGES, PLACES], DType::U32, device)?,
            mask: indices(&mask, &[PASSAGES, PLACES], DType::U8, device)?,
        })
    }

    fn part(&self, passages: &std::ops::Range<usize>) -> Result<Part> {
        let of = |tensor: &Tensor| tensor.narrow(0, passages.start, passages.len());
        Ok(Part { hidden: of(&self.hidden)?, target: of(&self.target)?, mask: of(&self.mask)? })
    }
}

struct Part {
    hidden: Tensor,
    target: Tensor,
    mask: Tensor,
}

/// The ways to the loss of a part: its mean over the part's own count, or over another.
#[derive(Clone, Copy, Debug)]
enum Way {
    Logits,
    Linear,
    Composed,
}

impl Way {
    const ALL: [Self; 3] = [Way::Logits, Way::Linear, Way::Composed];

    fn linear(self, part: &Part) -> LinearCrossEntropyLoss {
        // chunks that end amid a passage
        let loss = LinearCrossEntropyLoss::new().with_row_weight(part.mask.clone()).with_chunk_rows(5);
        loss.with_fused(!matches!(self, Way::Composed))
    }

    fn of_logits(part: &Part) -> Result<CrossEntropyLoss> {
        Ok(CrossEntropyLoss::new().with_row_weight(part.mask.flatten_all()?))
    }

    fn count(self, part: &Part) -> Result<Tensor> {
        match self {
            Way::Logits => Self::of_logits(part)?.count(&part.target.flatten_all()?),
            Way::Linear | Way::Composed => self.linear(part).count(&part.target),
        }
    }

    fn loss(self, part: &Part, weight: &Tensor, normalizer: Option<&Tensor>) -> Result<Tensor> {
        if let Way::Logits = self {
            let logits = part.hidden.flatten_to(1)?.matmul(&weight.t()?)?;
            let loss = Self::of_logits(part)?;
            let loss = normalizer.map_or(loss.clone(), |normalizer| loss.with_normalizer(normalizer));
            return loss.forward(&logits, &part.target.flatten_all()?);
        }
        let loss = self.linear(part);
        let loss = normalizer.map_or(loss.clone(), |normalizer| loss.with_normalizer(normalizer));
        loss.forward(&part.hidden, weight, None, &part.target)
    }
}

/// A loss and its gradients with respect to the hidden states and the weight.
struct Results {
    loss: f64,
    grads: [Vec<f64>; 2],
}

/// The sum of all parts' results, times a factor.
fn accumulated(data: &Data, way: Way, parts: &[Part], normalizer: Option<&Tensor>, factor: f64) -> Result<Results> {
    let mut sum = Results { loss: 0.0, grads: [&data.hidden, &data.weight].map(|var| vec![0.0; var.elem_count()]) };
    for part in parts {
        let loss = way.loss(part, &data.weight, normalizer)?;
        let grads = loss.backward()?;
        sum.loss += factor * values(&loss)?[0];
        for (sum, var) in sum.grads.iter_mut().zip([&data.hidden, &data.weight]) {
            let grad = values(grads.get(var).expect("a gradient"))?;
            sum.iter_mut().zip(grad).for_each(|(sum, grad)| *sum += factor * grad);
        }
    }
    Ok(sum)
}

/// The largest distance between two results' gradients, and the largest gradient.
fn distance(got: &Results, want: &Results) -> (f64, f64) {
    let pairs = || got.grads.iter().flatten().zip(want.grads.iter().flatten());
    let off = pairs().map(|(got, want)| (got - want).abs()).fold(0.0, f64::max);
    (off, want.grads.iter().flatten().fold(0.0, |largest, grad| grad.abs().max(largest)))
}

#[test]
fn parts_that_share_a_normalizer_are_one_batch() -> Result<()> {
    everywhere(|device| {
        let data = Data::new(device)?;
        let whole = [data.part(&(0..PASSAGES))?];
        let parts = PARTS.iter().map(|passages| data.part(passages)).collect::<Result<Vec<_>>>()?;
        for way in Way::ALL {
            let counts = parts.iter().map(|part| way.count(part)).collect::<Result<Vec<_>>>()?;
            let counts = Tensor::stack(&counts, 0)?;
            assert_eq!(values(&counts)?, [14.0, 3.0, 6.0], "{way:?}");
            let want = accumulated(&data, way, &whole, None, 1.0)?;
            let got = accumulated(&data, way, &parts, Some(&counts.sum_all()?), 1.0)?;
            // the same products of up to 23 rows in another order: each sum may be off by an epsilon for each of them
            let tolerance = 23.0 * f64::from(f32::EPSILON);
            let (off, largest) = distance(&got, &want);
            assert!(off <= tolerance * largest, "{way:?}: gradients off by {off:e} of {largest:e}");
            assert!((got.loss - want.loss).abs() <= tolerance * want.loss, "{way:?}: {} {}", got.loss, want.loss);

            // the mean of the parts' means weighs a row of the part with 3 rows nearly five times as much as one of 14
            let naive = accumulated(&data, way, &parts, None, 1.0 / PARTS.len() as f64)?;
            let (off, largest) = distance(&naive, &want);
            assert!(off > 0.1 * largest, "{way:?}: the mean of means is off by {off:e} of {largest:e} only");
        }
        Ok(())
    })
}
