//! A decoder-only transformer: causal attention, gated feed-forward layers, RMS norm before each, and one matrix for
//! the embedding and the head.
//!
//! Only those of candle's ops that have a gradient can be used. Its fused softmax has none, so this crate's log-softmax
//! takes its place.

use candle_core::{D, Device, Result, Tensor, Var};
use candle_fused_loss::log_softmax;
use candle_nn::ops::silu;

use crate::rng::Rng;

pub const WIDTH: usize = 128;
const HEADS: usize = 4;
const LAYERS: usize = 3;
const INNER: usize = 320;

pub struct Model {
    /// `(V, WIDTH)`: the embedding, and the head.
    pieces: Var,
    /// `(T, WIDTH)`
    places: Var,
    layers: Vec<Layer>,
    /// `(T, T)`: 0, or -inf where the key comes after the query.
    mask: Tensor,
}

struct Layer {
    /// Queries, keys and values side by side.
    attention_in: Var,
    attention_out: Var,
    /// Values and gates side by side.
    inner_in: Var,
    inner_out: Var,
}

/// RMS norm, without a gain: the matrix that follows has one.
fn norm(x: &Tensor) -> Result<Tensor> {
    let size = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-6)?.sqrt()?;
    x.broadcast_div(&size)
}

fn normal(rows: usize, columns: usize, scale: f64, rng: &mut Rng, device: &Device) -> Result<Var> {
    let values: Vec<f32> = (0..rows * columns).map(|_| (scale * rng.normal()) as f32).collect();
    Var::from_tensor(&Tensor::from_vec(values, (rows, columns), device)?)
}

/// `x weight`, for the rows of x whatever its leading axes.
fn linear(x: &Tensor, weight: &Var) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    dims.pop();
    dims.push(weight.dim(1)?);
    x.flatten_to(D::Minus2)?.matmul(weight)?.reshape(dims)
}

impl Layer {
    fn new(rng: &mut Rng, device: &Device) -> Result<Self> {
        let scale = (WIDTH as f64).powf(-0.5);
        // so that the sum over all layers keeps its scale
        let out = |inner: usize| (inner as f64 * 2.0 * LAYERS as f64).powf(-0.5);
        Ok(Layer {
            attention_in: normal(WIDTH, 3 * WIDTH, scale, rng, device)?,
            attention_out: normal(WIDTH, WIDTH, out(WIDTH), rng, device)?,
            inner_in: normal(WIDTH, 2 * INNER, scale, rng, device)?,
            inner_out: normal(INNER, WIDTH, out(INNER), rng, device)?,
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (batch, places, _) = x.dims3()?;
        let size = WIDTH / HEADS;
        // (3, B, HEADS, T, size)
        let qkv = linear(&norm(x)?, &self.attention_in)?
            .reshape((batch, places, 3, HEADS, size))?
            .permute((2, 0, 3, 1, 4))?
            .contiguous()?;
        let (q, k, v) = (qkv.get(0)?, qkv.get(1)?, qkv.get(2)?);
        let scores =
            ((q / (size as f64).sqrt())?.matmul(&k.t()?)? + mask.broadcast_as((batch, HEADS, places, places))?)?;
        let seen =
            log_softmax(&scores, D::Minus1)?.exp()?.matmul(&v)?.transpose(1, 2)?.reshape((batch, places, WIDTH))?;
        let x = (x + linear(&seen, &self.attention_out)?)?;
        let inner = linear(&norm(&x)?, &self.inner_in)?;
        let (value, gate) = (inner.narrow(2, 0, INNER)?, inner.narrow(2, INNER, INNER)?);
        &x + linear(&(value * silu(&gate.contiguous()?)?)?, &self.inner_out)?
    }

    fn parameters(&self) -> Vec<Var> {
        [&self.attention_in, &self.attention_out, &self.inner_in, &self.inner_out].map(Var::clone).to_vec()
    }
}

impl Model {
    pub fn new(vocabulary: usize, places: usize, rng: &mut Rng, device: &Device) -> Result<Self> {
        let later = |from: usize, to: usize| if to > from { f32::NEG_INFINITY } else { 0.0 };
        let mask: Vec<f32> = (0..places * places).map(|i| later(i / places, i % places)).collect();
        Ok(Model {
            pieces: normal(vocabulary, WIDTH, 0.05, rng, device)?,
            places: normal(places, WIDTH, 0.05, rng, device)?,
            layers: (0..LAYERS).map(|_| Layer::new(rng, device)).collect::<Result<_>>()?,
            mask: Tensor::from_vec(mask, (places, places), device)?,
        })
    }

    /// The head's input `(B, T, WIDTH)` for pieces `(B, T)`.
    pub fn hidden(&self, input: &Tensor) -> Result<Tensor> {
        let (batch, places) = input.dims2()?;
        let pieces = self.pieces.index_select(&input.flatten_all()?, 0)?.reshape((batch, places, WIDTH))?;
        let mask = self.mask.narrow(0, 0, places)?.narrow(1, 0, places)?.contiguous()?;
        let mut x = pieces.broadcast_add(&self.places.narrow(0, 0, places)?)?;
        for layer in &self.layers {
            x = layer.forward(&x, &mask)?;
        }
        norm(&x)
    }

    pub fn head(&self) -> &Tensor {
        &self.pieces
    }

    pub fn places(&self) -> usize {
        self.mask.dims()[0]
    }

    pub fn device(&self) -> &Device {
        self.mask.device()
    }

    pub fn parameters(&self) -> Vec<Var> {
        let layers = self.layers.iter().flat_map(Layer::parameters);
        [self.pieces.clone(), self.places.clone()].into_iter().chain(layers).collect()
    }
}
