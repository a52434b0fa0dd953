// With bindings.h all that knows Python: integers become pointers, the GIL is released, a status
// becomes an exception. Argument order follows the structs in pygan.h.

#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "pygan.h"

namespace py = pybind11;

namespace {

using pygan::bindings::Address;
using pygan::bindings::group_of;
using pygan::bindings::pointer;

void raise_unless_ok(pygan::Status status) {
  if (status != pygan::Status::ok) throw std::invalid_argument(pygan::describe(status));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of pygan. Arrays are passed as addresses; see csrc/pygan.h.";

  py::class_<pygan::NormActShape>(module, "NormActShape")
      .def(py::init([](int dtype, int layout, int64_t batch, int64_t channels, int64_t spatial,
                       int64_t groups, int activation, float negative_slope, int threads) {
             return pygan::NormActShape{static_cast<pygan::DType>(dtype),
                                        static_cast<pygan::Layout>(layout),
                                        batch,
                                        channels,
                                        spatial,
                                        groups,
                                        static_cast<pygan::Activation>(activation),
                                        negative_slope,
                                        threads};
           }),
           py::arg("dtype"), py::arg("layout"), py::arg("batch"), py::arg("channels"),
           py::arg("spatial"), py::arg("groups"), py::arg("activation"), py::arg("negative_slope"),
           py::arg("threads"))
      .def_readonly("batch", &pygan::NormActShape::batch)
      .def_readonly("channels", &pygan::NormActShape::channels)
      .def_readonly("spatial", &pygan::NormActShape::spatial);

  module.def("norm_act_scratch", &pygan::norm_act_scratch, py::arg("shape"));

  module.def(
      "norm_act_forward",
      [](const pygan::NormActShape& shape, Address x, Address weight, Address bias, bool training,
         double eps, double momentum, Address running_mean, Address running_var, Address y,
         Address mean, Address invstd, Address coefficients, Address scratch) {
        const pygan::NormActForward args{shape,
                                         pointer<const void>(x),
                                         pointer<const float>(weight),
                                         pointer<const float>(bias),
                                         training,
                                         eps,
                                         momentum,
                                         pointer<float>(running_mean),
                                         pointer<float>(running_var),
                                         pointer<void>(y),
                                         pointer<float>(mean),
                                         pointer<float>(invstd),
                                         pointer<float>(coefficients),
                                         pointer<double>(scratch)};
        py::gil_scoped_release release;
        raise_unless_ok(pygan::norm_act_forward(args));
      },
      py::arg("shape"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("training"),
      py::arg("eps"), py::arg("momentum"), py::arg("running_mean"), py::arg("running_var"),
      py::arg("y"), py::arg("mean"), py::arg("invstd"), py::arg("coefficients"),
      py::arg("scratch"));

  module.def(
      "norm_act_backward",
      [](const pygan::NormActShape& shape, Address x, Address dy, Address weight, Address bias,
         Address mean, Address invstd, bool training, Address dx, Address dweight, Address dbias,
         Address scratch) {
        const pygan::NormActBackward args{shape,
                                          pointer<const void>(x),
                                          pointer<const void>(dy),
                                          pointer<const float>(weight),
                                          pointer<const float>(bias),
                                          pointer<const float>(mean),
                                          pointer<const float>(invstd),
                                          training,
                                          pointer<void>(dx),
                                          pointer<float>(dweight),
                                          pointer<float>(dbias),
                                          pointer<double>(scratch)};
        py::gil_scoped_release release;
        raise_unless_ok(pygan::norm_act_backward(args));
      },
      py::arg("shape"), py::arg("x"), py::arg("dy"), py::arg("weight"), py::arg("bias"),
      py::arg("mean"), py::arg("invstd"), py::arg("training"), py::arg("dx"), py::arg("dweight"),
      py::arg("dbias"), py::arg("scratch"));

  module.def("norm_act_second_scratch", &pygan::norm_act_second_scratch, py::arg("shape"));

  module.def(
      "norm_act_second",
      [](const pygan::NormActShape& shape, Address x, Address dy, Address ddx, Address weight,
         Address bias, Address ddweight, Address ddbias, Address mean, Address invstd,
         bool training, Address dx, Address ddy, Address dweight, Address scratch) {
        const pygan::NormActSecond args{shape,
                                        pointer<const void>(x),
                                        pointer<const void>(dy),
                                        pointer<const void>(ddx),
                                        pointer<const float>(weight),
                                        pointer<const float>(bias),
                                        pointer<const float>(ddweight),
                                        pointer<const float>(ddbias),
                                        pointer<const float>(mean),
                                        pointer<const float>(invstd),
                                        training,
                                        pointer<void>(dx),
                                        pointer<void>(ddy),
                                        pointer<float>(dweight),
                                        pointer<double>(scratch)};
        py::gil_scoped_release release;
        raise_unless_ok(pygan::norm_act_second(args));
      },
      py::arg("shape"), py::arg("x"), py::arg("dy"), py::arg("ddx"), py::arg("weight"),
      py::arg("bias"), py::arg("ddweight"), py::arg("ddbias"), py::arg("mean"), py::arg("invstd"),
      py::arg("training"), py::arg("dx"), py::arg("ddy"), py::arg("dweight"), py::arg("scratch"));

  py::class_<pygan::StridedConvShape>(module, "StridedConvShape")
      .def(py::init([](int dtype, int weight_layout, int64_t batch, int64_t height, int64_t width,
                       int64_t big_height, int64_t big_width, int64_t small_channels,
                       int64_t big_channels, int method, int normalized, int threads) {
             return pygan::StridedConvShape{static_cast<pygan::DType>(dtype),
                                            static_cast<pygan::Layout>(weight_layout),
                                            batch,
                                            height,
                                            width,
                                            big_height,
                                            big_width,
                                            small_channels,
                                            big_channels,
                                            static_cast<pygan::ConvMethod>(method),
                                            static_cast<pygan::ConvMap>(normalized),
                                            threads};
           }),
           py::arg("dtype"), py::arg("weight_layout"), py::arg("batch"), py::arg("height"),
           py::arg("width"), py::arg("big_height"), py::arg("big_width"), py::arg("small_channels"),
           py::arg("big_channels"), py::arg("method"), py::arg("normalized"), py::arg("threads"))
      .def_readonly("batch", &pygan::StridedConvShape::batch)
      .def_readonly("height", &pygan::StridedConvShape::height)
      .def_readonly("width", &pygan::StridedConvShape::width)
      .def_readonly("big_height", &pygan::StridedConvShape::big_height)
      .def_readonly("big_width", &pygan::StridedConvShape::big_width)
      .def_readonly("small_channels", &pygan::StridedConvShape::small_channels)
      .def_readonly("big_channels", &pygan::StridedConvShape::big_channels);

  module.def(
      "strided_conv_method",
      [](const pygan::StridedConvShape& shape, int pass) {
        return static_cast<int>(
            pygan::strided_conv_method(shape, static_cast<pygan::ConvPass>(pass)));
      },
      py::arg("shape"), py::arg("conv_pass"));

  module.def(
      "strided_conv_scratch",
      [](const pygan::StridedConvShape& shape, int pass) {
        return pygan::strided_conv_scratch(shape, static_cast<pygan::ConvPass>(pass));
      },
      py::arg("shape"), py::arg("conv_pass"));

  module.def(
      "strided_conv_up",
      [](const pygan::StridedConvShape& shape, Address small, Address gate, Address coefficients,
         int64_t groups, float negative_slope, Address weight, Address bias, Address big,
         Address scratch) {
        const pygan::StridedConvUp args{shape,
                                        pointer<const void>(small),
                                        pointer<const void>(gate),
                                        {pointer<const float>(coefficients), groups},
                                        negative_slope,
                                        pointer<const float>(weight),
                                        pointer<const float>(bias),
                                        pointer<void>(big),
                                        pointer<void>(scratch)};
        py::gil_scoped_release release;
        raise_unless_ok(pygan::strided_conv_up(args));
      },
      py::arg("shape"), py::arg("small"), py::arg("gate"), py::arg("coefficients"),
      py::arg("groups"), py::arg("negative_slope"), py::arg("weight"), py::arg("bias"),
      py::arg("big"), py::arg("scratch"));

  module.def(
      "strided_conv_down",
      [](const pygan::StridedConvShape& shape, Address big, Address coefficients, int64_t groups,
         Address weight, Address bias, int activation, float negative_slope, Address small,
         Address scratch) {
        const pygan::StridedConvDown args{shape,
                                          pointer<const void>(big),
                                          {pointer<const float>(coefficients), groups},
                                          pointer<const float>(weight),
                                          pointer<const float>(bias),
                                          static_cast<pygan::Activation>(activation),
                                          negative_slope,
                                          pointer<void>(small),
                                          pointer<void>(scratch)};
        py::gil_scoped_release release;
        raise_unless_ok(pygan::strided_conv_down(args));
      },
      py::arg("shape"), py::arg("big"), py::arg("coefficients"), py::arg("groups"),
      py::arg("weight"), py::arg("bias"), py::arg("activation"), py::arg("negative_slope"),
      py::arg("small"), py::arg("scratch"));

  module.def(
      "strided_conv_weight_grad",
      [](const pygan::StridedConvShape& shape, Address small, Address gate, Address coefficients,
         int64_t groups, float negative_slope, Address big, Address dweight, Address scratch) {
        const pygan::StridedConvWeightGrad args{shape,
                                                pointer<const void>(small),
                                                pointer<const void>(gate),
                                                {pointer<const float>(coefficients), groups},
                                                negative_slope,
                                                pointer<const void>(big),
                                                pointer<float>(dweight),
                                                pointer<void>(scratch)};
        py::gil_scoped_release release;
        raise_unless_ok(pygan::strided_conv_weight_grad(args));
      },
      py::arg("shape"), py::arg("small"), py::arg("gate"), py::arg("coefficients"),
      py::arg("groups"), py::arg("negative_slope"), py::arg("big"), py::arg("dweight"),
      py::arg("scratch"));

  module.def(
      "gan_loss",
      [](int dtype, const py::tuple& groups, Address loss) {
        pygan::GanLoss args{static_cast<pygan::DType>(dtype),
                            {},
                            static_cast<int>(groups.size()),
                            pointer<float>(loss)};
        for (size_t i = 0; i < groups.size() && i < 2; ++i) {
          args.groups[i] = group_of(groups[i].cast<py::tuple>());
        }
        py::gil_scoped_release release;
        raise_unless_ok(pygan::gan_loss(args));
      },
      py::arg("dtype"), py::arg("groups"), py::arg("loss"));

  module.def(
      "image_batch",
      [](Address images, int64_t count, int64_t height, int64_t width, int64_t channels,
         Address index, Address flip, int64_t batch, int dtype, Address out, int threads) {
        const pygan::ImageBatch args{pointer<const uint8_t>(images),
                                     count,
                                     height,
                                     width,
                                     channels,
                                     pointer<const int64_t>(index),
                                     pointer<const uint8_t>(flip),
                                     batch,
                                     static_cast<pygan::DType>(dtype),
                                     pointer<void>(out),
                                     threads};
        py::gil_scoped_release release;
        raise_unless_ok(pygan::image_batch(args));
      },
      py::arg("images"), py::arg("count"), py::arg("height"), py::arg("width"), py::arg("channels"),
      py::arg("index"), py::arg("flip"), py::arg("batch"), py::arg("dtype"), py::arg("out"),
      py::arg("threads"));

  module.def("isa", &pygan::instruction_set);
  module.def("isas", &pygan::instruction_sets);
}
